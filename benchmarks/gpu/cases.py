# SPDX-License-Identifier: BSD-3-Clause

"""What is measured on a GPU, as data: the most important cells first, because the time may run out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
PASSES = ("forward", "stats", "dx", "backward")  # stats: forward that returns them; backward: with parameter gradients


@dataclass(frozen=True)
class Case:
    op: str  # layer_norm, rms_norm, batch_norm, group_norm, instance_norm
    step: str  # one of PASSES
    shape: tuple[int, ...]  # rows x cells, or NCHW; `last` says that the memory is NHWC
    dtype: str
    groups: int = 0
    last: bool = False
    origin: str = ""
    part: str = "headline"  # or "scaling"

    @property
    def per_row(self) -> bool:
        return self.op in ("layer_norm", "rms_norm")

    @property
    def backward(self) -> bool:
        return self.step in ("dx", "backward")

    @property
    def center(self) -> bool:
        return self.op != "rms_norm"

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.per_row else self.shape[1]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return self.size * ITEMSIZE[self.dtype]

    @property
    def statistics(self) -> int:
        """How many means there are."""
        if self.per_row:
            return self.size // self.channels
        return {"batch_norm": 1, "instance_norm": self.shape[0], "group_norm": self.shape[0]}[self.op] * (
            self.groups or self.channels
        )

    @property
    def streams(self) -> int:
        """Arrays as large as x: x and y, or dy, x and dx."""
        return 3 if self.backward else 2

    @property
    def least_bytes(self) -> int:
        """Every input read once, every output written once."""
        vectors = 1 + self.center  # weight and bias, mean and rstd
        params = {"forward": vectors, "stats": vectors, "dx": 1, "backward": 1 + vectors}[self.step]
        stats = 0 if self.step == "forward" else vectors * self.statistics * (4 if ITEMSIZE[self.dtype] == 2 else 8)
        item = 4 if self.op == "batch_norm" else ITEMSIZE[self.dtype]
        return self.streams * self.nbytes + params * self.channels * item + stats

    def shrunk(self) -> Case:
        """The same, small enough for a rehearsal on the host."""
        if self.per_row:
            return replace(self, shape=(min(self.shape[0], 32), min(self.shape[1], 4096)))
        n, c, h, w = self.shape
        return replace(self, shape=(min(n, 2), min(c, 256), min(h, 8), min(w, 8)))

    @property
    def label(self) -> str:
        shape = "x".join(map(str, self.shape))
        groups = f" G{self.groups}" if self.groups else ""
        return f"{self.op} {self.step} {shape}{groups}{' NHWC' if self.last else ''} {self.dtype}"


# (rows, cells): where they occur, which dtypes, which passes. From most to least important.
_BOTH = ("layer_norm", "rms_norm")
_ALL = ("forward", "backward")
_ROWS = [
    ((16384, 4096), _BOTH, ("bfloat16",), _ALL, "Llama-7B, 16k tokens"),
    ((131072, 128), _BOTH, ("bfloat16",), _ALL, "head dimension, QK norm"),
    ((1024, 12288), ("layer_norm",), ("bfloat16",), _ALL, "GPT-3, few tokens"),
    ((4096, 16384), _BOTH, ("bfloat16",), _ALL, "very wide"),
    ((65536, 1024), _BOTH, ("float32",), _ALL, "BERT-large, a large batch"),
    ((16384, 4096), ("layer_norm",), ("bfloat16",), ("stats", "dx"), "price of statistics, of parameter gradients"),
    ((8192, 8192), ("rms_norm",), ("bfloat16",), _ALL, "Llama-70B"),
    ((32768, 768), ("layer_norm",), ("float32", "float16"), _ALL, "BERT-base"),
    ((4096, 2048), ("rms_norm",), ("bfloat16",), _ALL, "published by others"),
    ((16384, 4096), ("layer_norm",), ("float32", "float16"), _ALL, "all dtypes"),
    ((8192, 5120), ("rms_norm",), ("bfloat16",), _ALL, "Llama-13B"),
    ((2048, 4096), ("rms_norm",), ("bfloat16",), _ALL, "Llama-7B, 2k tokens"),
    ((8192, 128), ("rms_norm",), ("bfloat16",), _ALL, "QK norm, few tokens"),
    ((1024, 65536), ("layer_norm",), ("bfloat16",), _ALL, "a cluster per row"),
    ((256, 262144), ("layer_norm",), ("float32",), _ALL, "rows larger than the chip's part"),
    ((131072, 128), ("layer_norm",), ("bfloat16",), ("stats", "dx"), "price of statistics, of parameter gradients"),
    ((16384, 4095), ("layer_norm",), ("bfloat16",), _ALL, "no alignment"),
]
_IMAGES = [
    ("batch_norm", (256, 64, 56, 56), "float16", (False, True), _ALL, 0, "ResNet-50, stage 1"),
    ("group_norm", (32, 256, 56, 56), "float16", (False, True), _ALL, 32, "detection"),
    ("instance_norm", (16, 64, 256, 256), "float32", (False, True), _ALL, 0, "style transfer"),
    ("group_norm", (2, 320, 64, 64), "float16", (False, True), _ALL, 32, "Stable Diffusion, UNet"),
    ("batch_norm", (256, 64, 112, 112), "float16", (False, True), _ALL, 0, "ResNet-50, stem"),
    ("batch_norm", (256, 512, 28, 28), "float16", (False, True), _ALL, 0, "ResNet-50, stage 2"),
    ("group_norm", (2, 128, 512, 512), "float16", (False, True), _ALL, 32, "Stable Diffusion, VAE"),
    ("batch_norm", (256, 2048, 7, 7), "float16", (False, True), _ALL, 0, "ResNet-50, stage 4"),
    ("group_norm", (2, 640, 32, 32), "float16", (False,), _ALL, 32, "Stable Diffusion, UNet"),
    ("group_norm", (2, 1280, 16, 16), "float16", (False,), _ALL, 32, "Stable Diffusion, UNet"),
    ("batch_norm", (256, 256, 56, 56), "float16", (False,), _ALL, 0, "ResNet-50, stage 1"),
    ("batch_norm", (64, 256, 56, 56), "float32", (False, True), _ALL, 0, "ResNet-50, float32"),
    ("batch_norm", (256, 1024, 14, 14), "bfloat16", (False,), _ALL, 0, "ResNet-50, stage 3"),
    ("instance_norm", (1, 128, 256, 256), "float32", (False,), _ALL, 0, "style transfer, one image"),
    ("group_norm", (32, 256, 56, 56), "float32", (False,), _ALL, 32, "float32"),
    ("group_norm", (32, 256, 56, 56), "float16", (False,), ("stats", "dx"), 32, "price of both"),
    ("batch_norm", (256, 64, 56, 56), "float16", (False,), ("stats", "dx"), 0, "price of both"),
]


def _rows() -> Iterator[Case]:
    for shape, ops, dtypes, steps, origin in _ROWS:
        for op in ops:
            for dtype in dtypes:
                for step in steps:
                    yield Case(op, step, shape, dtype, origin=origin)


def _images() -> Iterator[Case]:
    for op, shape, dtype, layouts, steps, groups, origin in _IMAGES:
        for last in layouts:
            for step in steps:
                yield Case(op, step, shape, dtype, groups, last, origin)


def _scaling() -> Iterator[Case]:
    """From one row to a million."""
    for step in _ALL:
        for power in range(0, 21, 4):
            yield Case("layer_norm", step, (1 << power, 1024), "bfloat16", origin="rows", part="scaling")


def cases() -> list[Case]:
    """The board's cells by priority: rows and images take turns, three to two; scaling before more of the same."""
    rows, images, chosen = list(_rows()), list(_images()), []
    while rows or images:
        chosen += rows[:6] + images[:4]
        del rows[:6], images[:4]
    return chosen[:60] + list(_scaling()) + chosen[60:]


# The cells that torch.compile and JAX take part in: they compile for seconds.
COMPILED = {
    (op, shape)
    for op, shape in (
        ("layer_norm", (16384, 4096)),
        ("rms_norm", (131072, 128)),
        ("layer_norm", (1024, 12288)),
        ("rms_norm", (16384, 4096)),
        ("layer_norm", (65536, 1024)),
        ("rms_norm", (4096, 16384)),
        ("batch_norm", (256, 64, 56, 56)),
        ("group_norm", (32, 256, 56, 56)),
        ("instance_norm", (16, 64, 256, 256)),
    )
}
