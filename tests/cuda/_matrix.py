"""The cases of the kernels' tests: norms in every geometry that takes another way through csrc/cuda/, each with options
(types, parameters, alignment, schedule) drawn once from its number.

`sweep` runs some of them outside pytest, for the sanitizer.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass

import numpy as np
from _kernels import Kernels, check_backward, check_forward, plan
from host.library import placed

from _cases import Case, batch, group, instance, layer, rms
from _checks import BF16, DTYPES, F16, F32, F64

# Rows: lanes of a warp, a block, clusters; one vector, several, whole and ragged.
ROWS = [
    *(layer((37, n)) for n in (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 33, 64, 67)),
    *(rms((37, n)) for n in (1, 2, 5, 8, 17, 64, 127)),
    layer((1, 1)),
    layer((1000, 3)),
    layer((129, 16)),
    layer((67, 128)),
    *(layer((9, n)) for n in (127, 255, 257, 384, 512, 513)),
    *(rms((9, n)) for n in (251, 256, 512, 515)),
    *(layer((5, n)) for n in (768, 1000, 1024, 1031)),
    *(layer((3, n)) for n in (2048, 2053, 4096, 4099)),
    *(rms((3, n)) for n in (1023, 2049, 3072, 4097)),
    layer((2, 5, 7, 33), axis=(1, 2, 3)),
    layer((50, 4, 5), axis=(1, 2)),
    *(layer((2, n)) for n in (8192, 8197, 12345)),
    rms((2, 16411)),
    layer((2, 20001)),
]
# Rows whose parameters cover runs of cells.
GROUPS = [
    group((3, 12, 5, 7), 4),
    group((3, 12, 5, 7), 1),
    group((3, 12, 5, 7), 12),
    group((2, 6, 1, 1), 3),
    group((5, 36), 4),
    group((5, 36), 36),
    group((4, 8, 3), 2),
    group((2, 64, 8, 8), 2),
    group((2, 30, 11, 13), 2),
    group((1, 8, 31, 33), 2),
    group((2, 6, 40, 41), 1),
    group((3, 515, 3), 5),
    group((2, 4, 4096), 2),
    instance((3, 12, 5, 7)),
    instance((3, 5, 61)),
    instance((2, 3, 1)),
    instance((2, 3, 33, 37)),
    instance((2, 2, 70, 71)),
    instance((1, 1, 90, 101)),
]
# Cells that lie apart: down the columns.
COLUMNS = [
    batch((71, 37)),
    batch((2, 1)),
    batch((2, 3)),
    batch((300, 5)),
    batch((513, 64)),
    batch((5000, 3)),
    batch((9, 260)),
    batch((6, 5, 7, 11), channel_axis=-1),
    batch((4, 9, 8, 16), channel_axis=-1),
    batch((6, 11, 2)),
    batch((6, 11, 3)),
    batch((6, 5, 11, 3), channel_axis=2),
    instance((3, 5, 7, 12), channel_axis=-1),
    instance((2, 17, 9, 33), channel_axis=-1),
    instance((2, 1, 1, 5), channel_axis=-1),
    instance((3, 3, 12, 2), channel_axis=2),
    group((3, 5, 7, 12), 4, channel_axis=-1),
    group((3, 5, 7, 12), 12, channel_axis=-1),
    group((2, 9, 9, 15), 5, channel_axis=-1),
    group((2, 4, 6, 2), 3, channel_axis=2),
    # several slices of a column, and more rows to a slice
    group((1, 300, 12), 4, channel_axis=-1),
    batch((140_001, 2)),
    layer((3, 19, 6, 7), axis=1),
    layer((67, 37), axis=0),
    layer((2, 3, 5, 9), axis=(1, 2)),
    layer((1, 300, 4), axis=1),
    layer((2, 1, 9), axis=1),
    layer((2, 131, 257), axis=1),
    rms((3, 19, 6, 7), axis=1),
    rms((67, 37), axis=0),
    rms((2, 129, 300), axis=1),
]
# Cells that lie apart, in runs.
RUNS = [
    batch((6, 11, 5, 7)),
    batch((11, 6, 35), channel_axis=0),
    batch((3, 5, 33)),
    batch((2, 3, 16, 16)),
    batch((1, 3, 16)),
    batch((5, 7, 61, 3)),
    batch((3, 2, 50, 51)),
    batch((6, 5, 11, 9), channel_axis=2),
    batch((9, 2, 1024)),
    group((3, 5, 7, 64), 4, channel_axis=-1),
    group((2, 5, 7, 66), 2, channel_axis=-1),
    group((2, 5, 7, 36), 1, channel_axis=-1),
    group((2, 40, 33, 34), 2, channel_axis=-1),
    group((3, 5, 12, 7), 3, channel_axis=2),
    group((2, 5, 6, 17), 2, channel_axis=2),
    instance((3, 5, 12, 16), channel_axis=2),
]
EVALUATION = [
    batch((6, 11, 35), training=False),
    batch((6, 35, 11), channel_axis=-1, training=False),
    batch((71, 37), training=False),
    batch((1, 1), training=False),
    batch((1, 5, 1, 1), training=False),
    batch((3, 2, 40, 41), training=False),
    batch((700, 8), training=False),
    batch((2, 300, 4), training=False),
    batch((6, 11, 3), training=False),
    batch((3, 5, 64), training=False),
]
CASES = ROWS + GROUPS + COLUMNS + RUNS + EVALUATION


@dataclass(frozen=True)
class Options:
    weight: bool
    bias: bool
    param: np.dtype  # of weight, bias, dweight, dbias
    stat: np.dtype  # of the statistics given to backward
    offset: int  # cells past an aligned address
    seed: int  # schedule
    cluster: int
    needs: tuple[str, ...]

    def __str__(self):
        given = "".join(c if yes else "-" for c, yes in (("w", self.weight), ("b", self.bias)))
        needs = "".join(name[0] for name in self.needs)
        return f"{given}:{self.param}+{self.offset},seed{self.seed},cluster{self.cluster},{needs}"


def options(number, case, dtype):
    """The first of each case: everything given, aligned; the others drawn."""
    r = np.random.default_rng(number)
    if dtype == F32:
        return Options(True, True, F32, F64, 0, number % 7, 8, case.names)
    params = [dtype, F32, F64]
    some = [case.names, ("x",), ("weight", "bias")[: len(case.names) - 1], ("x", "weight"), case.names]
    return Options(
        weight=bool(r.integers(4)),
        bias=bool(r.integers(4)),
        param=params[r.integers(3)] if dtype != F64 else [F32, F64, F64][r.integers(3)],
        stat=[F32, F64, dtype][r.integers(3)] if dtype == F64 else [F32, F64][r.integers(2)],
        offset=int(r.choice([0, 0, 1, 3])),
        seed=int(r.integers(20)),
        cluster=int(r.choice([8, 8, 1])),
        needs=some[r.integers(5)],
    )


@dataclass(frozen=True)
class Sample:
    """One test: a case, a type, options."""

    case: Case
    dtype: np.dtype
    options: Options

    def __str__(self):
        return f"{self.case}-{self.dtype}-{self.options}"

    def _begin(self, lib):
        lib.set_schedule(self.options.seed)
        lib.set_max_cluster(self.options.cluster)

    def _place(self, array):
        return placed(array, self.options.offset * self.dtype.itemsize)

    def _room(self, lib):
        return lib.room(self.case.shape, self.dtype, self.options.offset * self.dtype.itemsize)

    def _parameters(self):
        o = self.options
        weight = self.case.weight(o.param) if o.weight else None
        return weight, self.case.bias(o.param) if o.bias else None

    def forward(self, lib):
        self._begin(lib)
        return check_forward(
            lib, self.case, self._place(self.case.x(self.dtype)), *self._parameters(), out=self._room(lib)
        )

    def backward(self, lib):
        self._begin(lib)
        o, case = self.options, self.case
        x, weight = self._place(case.x(self.dtype)), self._parameters()[0]
        if case.training:
            # One cell is its own mean only if that is not rounded.
            alone = case.geometry.cells.shape[1] == 1
            mean, rstd = case.exact_stats(x, dtype=F64 if alone else o.stat)
        else:
            mean, var = (a.astype(o.stat) for a in case.running())
            rstd = (1 / np.sqrt(var + case.eps)).astype(o.stat)
        out = self._room(lib) if "x" in o.needs else None
        return check_backward(
            lib, case, self._place(case.dy(self.dtype)), x, mean, rstd, weight, needs=o.needs, dtype=o.param, out=out
        )


def samples(cases=CASES):
    numbered = ((4 * i + j, case, dtype) for i, case in enumerate(cases) for j, dtype in enumerate(DTYPES))
    return [Sample(case, dtype, options(number, case, dtype)) for number, case, dtype in numbered]


def of_family(*names):
    """Samples whose geometry is "rows" or "columns"; "affine" for evaluation."""
    return [s for s in samples() if (plan(s.case)[0] if s.case.training else "affine") in names]


def sweep(path, step, first=0):
    """Every `step`-th sample, both ways, against a sanitized library. Prints how many were right."""
    lib, right, wrong = Kernels(path, guard=0), 0, 0
    for sample in samples()[first::step]:
        for call in (sample.forward, sample.backward):
            try:
                call(lib)
                right += 1
            except Exception:
                wrong += 1
                print(f"{sample} {call.__name__}\n{traceback.format_exc()}", file=sys.stderr)
    print(right)
    return wrong


__all__ = ["BF16", "CASES", "F16", "F32", "F64", "Sample", "of_family", "samples", "sweep"]
