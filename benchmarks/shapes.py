"""What is measured, as data: operations, shapes, dtypes, and the sets that ``--set`` names.

A new row of the board is one more line in a table below. Shapes are written in memory order, so a channels-last batch
of images is ``(N, H, W, C)`` with ``channel_axis=-1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
        return self.streams * self.nbytes + (parameters + self.backward) * self.channels * ITEMSIZE[self.dtype]

    @property
    def layout(self) -> str:
        if self.per_row:
            return "" if self.axis in (-1, len(self.shape) - 1) else f"axis={self.axis}"
        return "channels-last" if self.channels_last else ""

    @property
    def label(self) -> str:
        shape = "x".join(map(str, self.shape))
        return " ".join(part for part in (self.op, shape, self.layout, self.dtype) if part)


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
    return [
        Case(c.op, c.shape, dtype, c.axis, c.channel_axis, c.groups, c.origin)
        for c in cases
        if c.shape in ops.get(c.op, ())
    ]


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


def _full() -> list[Case]:
    cases = list(_float32())
    everything = {op: tuple({c.shape for c in cases}) for op in OPS}
    return cases + [c for dtype in DTYPES[1:] for c in _with_dtype(cases, dtype, everything)]


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
    cases.append(Case("batch_norm", (64, 48), origin="quick"))
    for dtype in DTYPES[1:]:
        cases.append(Case("layer_norm", rows, dtype, origin="quick"))
        cases.append(Case("batch_norm", image, dtype, origin="quick"))
    return cases


SETS = {"quick": _quick, "headline": _headline, "full": _full}


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
