"""What the ops are given: layouts for each number of cells, kinds of data, and samples drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from ..problem import EPS, EPS_DEFAULT, View, numpy_dtype, view_of
from ..shapes import Case

OPS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "batch_norm_eval")
DTYPES = ("float32", "float64", "float16", "bfloat16")
SIZES = (1, 2, 3, 10, 100, 1000, 10**4, 10**5, 10**6, 10**7)  # cells that share a statistic
LARGE = 10**5  # from here on one layout, in turn by kind
MOST = {10**6: ("offset 0", "offset 1e4", "dy near 1"), 10**7: ("offset 1e4",)}  # kinds of the largest
LONG_DOUBLE = 10**6  # the largest for float64, which is measured in slow long double


@dataclass(frozen=True)
class Kind:
    """`rows(rng, count, n)` gives float64 data, one reduction a row."""

    name: str
    rows: Callable[[np.random.Generator, int, int], np.ndarray]
    eps: float | None = None  # None: the default of the op
    dtypes: tuple[str, ...] = DTYPES
    dy_mean: float = 0.0
    dy_scale: float = 1.0


def normal(mean: float = 0.0, scale: float = 1.0):
    return lambda rng, count, n: mean + scale * rng.standard_normal((count, n))


def constant(rng, count, n):
    return np.broadcast_to(10 * rng.standard_normal((count, 1)), (count, n))


def spike(rng, count, n):
    x = rng.standard_normal((count, n))
    x[np.arange(count), rng.integers(0, n, count)] = 1e4
    return x


def ramp(rng, count, n):
    return np.linspace(-3e3, 5e4, n) + rng.standard_normal((count, 1))


def two_values(rng, count, n):
    return np.where(rng.random((count, n)) < 0.37, 0.1, 0.3)


def power(value: float) -> str:
    """0, 1, 100, 1e4, 1e-30: as people write powers of ten."""
    if value == 0 or 1 <= value < 1000:
        return f"{value:g}"
    digit, exponent = f"{value:.0e}".split("e")
    return f"{digit}e{int(exponent)}"


WIDE_RANGE = ("float32", "float64", "bfloat16")
KINDS = (
    *(Kind(f"offset {power(mean)}", normal(mean)) for mean in (0.0, 1.0, 100.0, 1e4)),
    # float16 ends at 65504; for float64 the promise ends at 1e4 standard deviations.
    *(Kind(f"offset {power(mean)}", normal(mean), dtypes=("float32", "bfloat16")) for mean in (1e5, 1e6)),
    *(
        Kind(f"scale {power(scale)}, eps=0", normal(scale=scale), eps=0.0, dtypes=dtypes)
        for scales, dtypes in (((1e-30, 1e-15, 1e15, 1e30), WIDE_RANGE), ((1e-3, 1e3), ("float16",)))
        for scale in scales
    ),
    Kind("normal, eps=0", normal(0.7), eps=0.0),
    Kind("constant", constant),
    Kind("constant, eps=0", constant, eps=0.0),
    Kind("spike of 1e4", spike),
    Kind("ramp", ramp),
    Kind("two values", two_values),
    Kind("dy near 1", normal(0.7), dy_mean=1.0, dy_scale=0.1),
    # Smaller dy, for dx to stay below the largest number. float64: the squares would vanish.
    Kind("subnormal, eps=0", normal(0.3e-40, 1e-40), eps=0.0, dtypes=("float32", "bfloat16"), dy_scale=1e-6),
    Kind("subnormal, eps=0", normal(3e-6, 1e-5), eps=0.0, dtypes=("float16",), dy_scale=1e-2),
)


def kinds(dtype: str, n: int) -> list[Kind]:
    if dtype == "float64" and n > LONG_DOUBLE:
        return []
    return [kind for kind in KINDS if dtype in kind.dtypes and (n not in MOST or kind.name in MOST[n])]


def layouts(op: str, n: int, dtype: str) -> list[Case]:
    """Cases whose reductions, or else whose parameter gradients, are sums of n cells."""
    many = min(32, max(1, 3 * 10**4 // n))
    few = min(3, many)
    if op in ("layer_norm", "rms_norm"):
        shapes = [((many, n), {"axis": -1}), ((n, few), {"axis": 0}), ((n, 4), {"axis": -1})]
        return [Case(op, shape, dtype, **where) for shape, where in shapes[: 3 if n < LARGE else 2]]
    if op.startswith("batch_norm"):
        if n < 4:
            return [Case(op, (n, 3), dtype)] if n > 1 else []
        shapes = [((4, few, n // 4), 1), ((4, n // 4, few), -1), ((n, few), 1)]
        return [Case(op, shape, dtype, channel_axis=axis) for shape, axis in shapes]
    each = 2 if op == "group_norm" and n % 2 == 0 else 1  # channels of a group
    groups = 2 if n < LARGE else 1
    channels = groups * each
    shapes = [((few, channels, n // each), 1), ((few, n // each, channels), -1)]
    number = groups if op == "group_norm" else 0
    if op == "instance_norm":
        channels = groups
        shapes = [((few, channels, n), 1), ((few, n, channels), -1)]
    return [Case(op, shape, dtype, channel_axis=axis, groups=number) for shape, axis in shapes]


@dataclass
class Sample:
    """The arrays of one call forward and one back, reproducible from case, kind and number alone."""

    case: Case
    view: View
    eps: float
    x: np.ndarray
    dy: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    running: tuple[np.ndarray, np.ndarray] | None
    label: str


def draw(case: Case, kind: Kind, number: int) -> Sample:
    label = f"{case.label}, {kind.name}, sample {number}"
    rng = np.random.default_rng([number, crc32(label.encode())])
    dtype, view = numpy_dtype(case.dtype), view_of(case)
    order = [i for i in range(len(view.shape)) if i not in view.axes] + list(view.axes)
    n = int(np.prod([view.shape[i] for i in view.axes]))
    rows = kind.rows(rng, case.size // n, n).reshape([view.shape[i] for i in order])
    with np.errstate(over="ignore"):  # of 16 bits, by kinds that go to the end of the format
        x = np.ascontiguousarray(rows.transpose(np.argsort(order)).astype(dtype)).reshape(case.shape)
    dy = kind.dy_mean + kind.dy_scale * rng.standard_normal(case.shape)
    weight = 1 + 0.1 * rng.standard_normal(case.channels)
    bias = None if case.family == "rms_norm" else (0.1 * rng.standard_normal(case.channels)).astype(dtype)
    running = None
    if case.op == "batch_norm_eval":
        cells = x.astype(np.float64).reshape(view.shape)
        mean, var = cells.mean(axis=view.axes).ravel(), cells.var(axis=view.axes).ravel()
        var = np.where(var > 1e-20 * mean**2, 0.9 * var, 1)
        # Near those of the data, as after training; float64, which holds the variance of any float32 data.
        running = mean + 0.1 * np.sqrt(var) * rng.standard_normal(mean.size), var
    eps = EPS.get(case.family, EPS_DEFAULT) if kind.eps is None else kind.eps
    return Sample(case, view, eps, x, dy.astype(dtype), weight.astype(dtype), bias, running, label)


def samples(op: str, dtype: str, n: int) -> Iterator[tuple[Kind, Sample]]:
    """All samples of one op, dtype and size: more of them where they are small."""
    cases = layouts(op, n, dtype)
    for turn, kind in enumerate(kinds(dtype, n)):
        chosen = cases if n < LARGE else cases[turn % len(cases) :][:1]
        for case in chosen:
            for number in range(3 if n <= 100 else 1):
                yield kind, draw(case, kind, number)
