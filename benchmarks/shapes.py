"""What is measured, as data: operations, shapes, dtypes, and the sets that ``--set`` names.

A new row of the board is one more line in a table below. Shapes are written in memory order, so a channels-last batch
of images is ``(N, H, W, C)`` with ``channel_axis=-1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch

DTYPES = ("float32", "float64", "float16", "bfloat16")
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
OPS = (
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "batch_norm",
    "batch_norm_eval",
    "batch_norm_backward",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
)


@dataclass(frozen=True)
class Case:
    """One cell of the board before threads and peers are chosen."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    axis: int = -1  # layer and RMS norm: the axis that is normalised
    channel_axis: int = 1  # the other norms
    groups: int = 0  # group norm
    origin: str = ""  # where such a shape occurs
    parameter_gradients: bool = True  # backward: dweight and dbias as well as dx

    @property
    def family(self) -> str:
        """Name of the norm, without the pass."""
        return self.op.removesuffix("_backward").removesuffix("_eval")

    @property
    def backward(self) -> bool:
        return self.op.endswith("_backward")

    @property
    def per_row(self) -> bool:
        """Layer and RMS norm: parameters lie along the normalised axis."""
        return self.family in ("layer_norm", "rms_norm")

    @property
    def channels(self) -> int:
        """Length of weight and bias."""
        return self.shape[self.axis if self.per_row else self.channel_axis]

    @property
    def channels_last(self) -> bool:
        return not self.per_row and self.channel_axis in (-1, len(self.shape) - 1) and len(self.shape) > 2

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return self.size * ITEMSIZE[self.dtype]

    @property
    def streams(self) -> int:
        """How many arrays as large as x must move: forward reads x and writes y; backward reads dy and x, writes dx."""
        return 3 if self.backward else 2

    @property
    def least_bytes(self) -> int:
        """The least possible traffic: every input read once, every output written once."""
        parameters = 1 if self.family == "rms_norm" else 2  # forward reads them; backward reads one and writes all
        if self.backward:
            parameters = 1 + parameters * self.parameter_gradients
        return self.streams * self.nbytes + parameters * self.channels * ITEMSIZE[self.dtype]

    @property
    def layout(self) -> str:
        if self.per_row:
            return "" if self.axis in (-1, len(self.shape) - 1) else f"axis={self.axis}"
        return "channels-last" if self.channels_last else ""

    @property
    def label(self) -> str:
        shape = "x".join(map(str, self.shape))
        gradients = "" if self.parameter_gradients else "dx only"
        return " ".join(part for part in (self.op, shape, self.layout, self.dtype, gradients) if part)


_ROWS = {
    (8, 768): "BERT-base, 8 tokens",
    (128, 768): "BERT-base, one sequence",
    (4096, 768): "BERT-base, ViT-B, a batch",
    (4096, 4096): "Llama-7B, 4096 tokens",
    (65536, 1024): "BERT-large, a large batch",
    (16, 262144): "few very wide rows",
    (400000, 16): "recommendation features",
}
_IMAGES = {
    (32, 64, 112, 112): "ResNet-50, stem",
    (32, 256, 56, 56): "ResNet-50, stage 1",
    (32, 2048, 7, 7): "ResNet-50, stage 4",
}
_GROUPED = {
    (2, 320, 64, 64): "Stable Diffusion, UNet",
    (2, 1280, 16, 16): "Stable Diffusion, UNet",
    (32, 256, 28, 28): "detection backbone",
}
_INSTANCE = {(4, 128, 256, 256): "style transfer", (32, 64, 112, 112): "style transfer, small"}
_TABULAR = {(4096, 512): "tabular, fully connected"}
_CONVNEXT = {(8, 96, 56, 56): "ConvNeXt"}


def _last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """NCHW to NHWC."""
    return (shape[0], *shape[2:], shape[1])


def _float32() -> Iterable[Case]:
    for shape, origin in _ROWS.items():
        for op in ("layer_norm", "rms_norm", "layer_norm_backward", "rms_norm_backward"):
            yield Case(op, shape, origin=origin)
    for shape, origin in _CONVNEXT.items():
        for op in ("layer_norm", "layer_norm_backward"):
            yield Case(op, shape, axis=1, origin=origin)
    for op in ("batch_norm", "batch_norm_backward", "batch_norm_eval"):
        for shape, origin in _IMAGES.items():
            yield Case(op, shape, origin=origin)
            yield Case(op, _last(shape), channel_axis=-1, origin=origin)
        for shape, origin in _TABULAR.items():
            yield Case(op, shape, origin=origin)
    for op in ("group_norm", "group_norm_backward"):
        for shape, origin in _GROUPED.items():
            yield Case(op, shape, groups=32, origin=origin)
            yield Case(op, _last(shape), channel_axis=-1, groups=32, origin=origin)
    for op in ("instance_norm", "instance_norm_backward"):
        for shape, origin in _INSTANCE.items():
            yield Case(op, shape, origin=origin)


def _with_dtype(cases: Iterable[Case], dtype: str, ops: dict[str, tuple[tuple[int, ...], ...]]) -> list[Case]:
    """The float32 cases whose op and shape are listed, in another dtype."""
    return [replace(case, dtype=dtype) for case in cases if case.shape in ops.get(case.op, ())]


def _headline() -> list[Case]:
    cases = list(_float32())
    wide, base, image, grouped = (4096, 4096), (4096, 768), (32, 256, 56, 56), (32, 256, 28, 28)
    half = {
        "layer_norm": (base, wide),
        "rms_norm": (wide,),
        "layer_norm_backward": (base,),
        "batch_norm": (image,),
        "group_norm": (grouped,),
    }
    brain = half | {
        "layer_norm": ((128, 768), base, wide, (65536, 1024)),
        "layer_norm_backward": (base, wide),
        "batch_norm_backward": (image,),
        "instance_norm": ((32, 64, 112, 112),),
    }
    double = half | {"batch_norm_backward": (image,)}
    return [
        *cases,
        *_with_dtype(cases, "bfloat16", brain),
        *_with_dtype(cases, "float16", half),
        *_with_dtype(cases, "float64", double),
    ]


# What networks run. A row of such a table is a model, then the shapes that its norms meet.
_TOKENS = (1, 32, 4096)  # one token, a few, a prompt or a batch
_WIDTHS = {768: "BERT-base", 1024: "BERT-large", 4096: "Llama-7B", 8192: "Llama-70B"}
_OTHER_ROWS = {
    (400000, 16): "recommendation, narrow",
    (100000, 64): "recommendation",
    (65536, 1024): "BERT-large, a large batch",
    (16, 262144): "few very wide rows",
    (1, 4194304): "one huge row",
}
_VIT = {(197, 768): "ViT-B, one image", (6304, 768): "ViT-B, 32 images"}
_CONVNEXTS = ((96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7))
_RESNET = {
    (64, 112, 112): "stem",
    (64, 56, 56): "stage 1",
    (256, 56, 56): "stage 1, out",
    (128, 28, 28): "stage 2",
    (512, 28, 28): "stage 2, out",
    (256, 14, 14): "stage 3",
    (1024, 14, 14): "stage 3, out",
    (512, 7, 7): "stage 4",
    (2048, 7, 7): "stage 4, out",
}
_RESNET_LAST = ((112, 112, 64), (56, 56, 256), (7, 7, 2048))
_MOBILENET = ((112, 112, 32), (56, 56, 144), (28, 28, 192), (14, 14, 576), (7, 7, 1280))
_GROUP_NORMS = {
    (2, 320, 64, 64): "Stable Diffusion, UNet",
    (2, 640, 32, 32): "Stable Diffusion, UNet",
    (2, 1280, 16, 16): "Stable Diffusion, UNet",
    (2, 1280, 8, 8): "Stable Diffusion, UNet",
    (1, 512, 64, 64): "Stable Diffusion, VAE",
    (1, 256, 256, 256): "Stable Diffusion, VAE",
    (1, 128, 512, 512): "Stable Diffusion, VAE",
    (32, 256, 28, 28): "detection backbone",
}
_GROUP_NORMS_LAST = ((2, 64, 64, 320), (2, 16, 16, 1280), (32, 28, 28, 256))
_INSTANCE_NORMS = {
    (4, 128, 256, 256): "style transfer",
    (1, 64, 128, 128): "style transfer, one image",
    (32, 64, 112, 112): "style transfer, small",
    (32, 3, 224, 224): "three-channel images",
    (8, 512, 3199): "audio, wav2vec",
    (2, 32, 64, 64, 64): "volumes, nnU-Net",
}
_BATCH_NORMS = {
    (16, 64, 16000): "audio",
    (2, 32, 64, 64, 64): "volumes",
    (32, 3, 224, 224): "three-channel images",
    (4096, 512): "tabular, fully connected",
    (65536, 64): "tabular, many rows",
    (128, 4096): "tabular, few rows",
}
_BATCH_OPS = ("batch_norm", "batch_norm_backward", "batch_norm_eval")


def _network_rows() -> Iterable[Case]:
    rows = {(m, n): f"{model}, {m} token{'s' * (m > 1)}" for n, model in _WIDTHS.items() for m in _TOKENS}
    for shape, origin in (rows | _OTHER_ROWS).items():
        for op in ("layer_norm", "rms_norm", "layer_norm_backward", "rms_norm_backward"):
            yield Case(op, shape, origin=origin)
    for shape, origin in _VIT.items():
        for op in ("layer_norm", "layer_norm_backward"):
            yield Case(op, shape, origin=origin)
    for shape in ((4096, 768), (4096, 4096)):
        for op in ("layer_norm_backward", "rms_norm_backward"):
            yield Case(op, shape, origin=f"{rows[shape]}, frozen parameters", parameter_gradients=False)
    for plane in _CONVNEXTS:
        for op in ("layer_norm", "layer_norm_backward"):
            yield Case(op, (8, *plane), axis=1, origin="ConvNeXt")


def _network_channels() -> Iterable[Case]:
    images = {(n, *plane): f"ResNet-50, {stage}" for n in (1, 32, 128) for plane, stage in _RESNET.items()}
    last = {(32, *plane): "ResNet-50" for plane in _RESNET_LAST}
    last |= {(n, *plane): "MobileNet" for n in (1, 32) for plane in _MOBILENET}
    last[32, 224, 224, 3] = "three-channel images"
    for op in _BATCH_OPS:
        for shape, origin in (images | _BATCH_NORMS).items():
            yield Case(op, shape, origin=origin)
        for shape, origin in last.items():
            yield Case(op, shape, channel_axis=-1, origin=origin)
    for op in ("group_norm", "group_norm_backward"):
        for shape, origin in _GROUP_NORMS.items():
            yield Case(op, shape, groups=32, origin=origin)
        yield Case(op, (4, 512, 2000), groups=1, origin="audio, Conv-TasNet")
        for shape in _GROUP_NORMS_LAST:
            yield Case(op, shape, channel_axis=-1, groups=32, origin="Stable Diffusion, channels last")
    for op in ("instance_norm", "instance_norm_backward"):
        for shape, origin in _INSTANCE_NORMS.items():
            yield Case(op, shape, origin=origin)
    image, grouped = (32, 256, 56, 56), (2, 320, 64, 64)
    frozen = "frozen parameters"
    yield Case("batch_norm_backward", image, origin=f"{images[image]}, {frozen}", parameter_gradients=False)
    yield Case("group_norm_backward", grouped, groups=32, origin=f"UNet, {frozen}", parameter_gradients=False)


def _networks() -> list[Case]:
    """The shapes of real networks in float32, and a choice of them in the other dtypes."""
    cases = [*_network_rows(), *_network_channels()]
    whole = [case for case in cases if case.parameter_gradients]
    base, wide, narrow, image, last = (4096, 768), (4096, 4096), (400000, 16), (32, 256, 56, 56), (32, 56, 56, 144)
    grouped = (2, 320, 64, 64)
    some = {
        "layer_norm": (base, wide, narrow),
        "rms_norm": (wide,),
        "layer_norm_backward": (base, wide),
        "rms_norm_backward": (wide,),
        "batch_norm": (image, last),
        "batch_norm_backward": (image,),
        "batch_norm_eval": (image,),
        "group_norm": (grouped,),
    }
    more = {
        "layer_norm": ((1, 768), (32, 768), base, wide, (65536, 1024), narrow, (8, 96, 56, 56)),
        "rms_norm": ((1, 4096), wide, (32, 8192)),
        "layer_norm_backward": ((32, 768), base, wide, narrow),
        "batch_norm": (image, last, (32, 2048, 7, 7), (4096, 512)),
        "batch_norm_backward": (image, last, (32, 2048, 7, 7)),
        "group_norm": (grouped, (2, 64, 64, 320)),
        "group_norm_backward": (grouped,),
        "instance_norm": ((32, 64, 112, 112),),
        "instance_norm_backward": ((32, 64, 112, 112),),
    }
    return [
        *cases,
        *_with_dtype(whole, "bfloat16", some | more),
        *_with_dtype(whole, "float16", some),
        *_with_dtype(whole, "float64", some),
    ]


def _quick() -> list[Case]:
    """Every op and layout once, small enough that an agreement check of all peers takes about a minute."""
    rows, image, last = (32, 256), (4, 16, 14, 14), (4, 14, 14, 16)
    cases = [Case(op, rows, origin="quick") for op in OPS if op.startswith(("layer", "rms"))]
    cases += [Case("layer_norm", (2, 24, 8, 8), axis=1, origin="quick")]
    for op in OPS:
        if op.startswith(("batch", "group", "instance")):
            groups = 4 if op.startswith("group") else 0
            cases.append(Case(op, image, groups=groups, origin="quick"))
            if not op.startswith("instance"):
                cases.append(Case(op, last, channel_axis=-1, groups=groups, origin="quick"))
    for op in ("layer_norm_backward", "rms_norm_backward"):
        cases.append(Case(op, rows, origin="quick", parameter_gradients=False))
    for op in ("batch_norm_backward", "group_norm_backward", "instance_norm_backward"):
        groups = 4 if op.startswith("group") else 0
        cases.append(Case(op, image, groups=groups, origin="quick", parameter_gradients=False))
    cases.append(Case("layer_norm_backward", (2, 24, 8, 8), axis=1, origin="quick"))
    cases.append(Case("batch_norm", (64, 48), origin="quick"))
    for dtype in DTYPES[1:]:
        cases.append(Case("layer_norm", rows, dtype, origin="quick"))
        cases.append(Case("batch_norm", image, dtype, origin="quick"))
    return cases


SETS = {"quick": _quick, "headline": _headline, "networks": _networks}


def matcher(ops: list[str] | None, shapes: list[str] | None, dtypes: list[str] | None) -> Callable[[Case], bool]:
    """The filters of the command line; ops take shell patterns, shapes are written ``4096x768``."""
    return lambda case: (
        (not ops or any(fnmatch(case.op, pattern) for pattern in ops))
        and (not shapes or "x".join(map(str, case.shape)) in shapes)
        and (not dtypes or case.dtype in dtypes)
    )


def select(
    name: str,
    ops: list[str] | None = None,
    shapes: list[str] | None = None,
    dtypes: list[str] | None = None,
) -> list[Case]:
    """The cases of a set that pass the filters."""
    return list(filter(matcher(ops, shapes, dtypes), SETS[name]()))
