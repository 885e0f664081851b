"""Backward of every norm: layout x dtype x weight x needs, against the exact gradient of the given statistics."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from _cases import LAYOUTS, batch, group, instance, layer, rms
from _checks import BF16, DTYPES, F16, F32, F64, assert_gradient, assert_gradients, assert_same_bits, same_bits

FEW = [
    layer((7, 33)),
    layer((3, 5, 6, 7), axis=(0, 2)),
    layer((33, 7), axis=0),
    rms((7, 33)),
    rms((3, 19, 7), axis=1),
    group((3, 6, 11), 2),
    group((3, 11, 6), 2, channel_axis=-1),
    instance((3, 4, 11)),
    instance((3, 11, 4), channel_axis=-1),
    batch((6, 5, 7)),
    batch((6, 7, 5), channel_axis=-1),
    batch((19, 5)),
    batch((6, 5, 7), training=False),
    batch((6, 7, 5), channel_axis=-1, training=False),
]
SIZES = [1, 2, 3, 7, 15, 16, 17, 31, 63, 64, 65, 257, 1023, 1024, 1025]


@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case, dtype, weighted):
    x, dy = case.x(dtype), case.dy(dtype)
    weight = case.weight(dtype) if weighted else None
    stats = case.exact_stats(x)
    got = case.backward(dy, x, *stats, weight, needs=case.names)
    want = case.exact_backward(dy, x, *stats, weight)
    assert isinstance(got, tuple)
    assert len(got) == len(case.names)
    assert all(g.dtype == dtype for g in got)
    assert_gradients(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_own_statistics(case, dtype):
    """The round trip: backward with exactly what forward returned."""
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    _, mean, rstd = case.forward(x, weight, bias, return_stats=True)
    got = case.backward(dy, x, mean, rstd, weight)
    assert_gradients(got, case.exact_backward(dy, x, mean, rstd, weight))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weight"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_needs(case, weighted, dtype):
    """Every subset gives the gradients that asking for all gives, and None for the rest; the order does not matter."""
    x, dy = case.x(dtype), case.dy(dtype)
    weight = case.weight(dtype) if weighted else None
    stats = case.exact_stats(x)
    everything = case.backward(dy, x, *stats, weight, needs=case.names)
    want = case.exact_backward(dy, x, *stats, weight)
    for length in range(len(case.names) + 1):
        for needs in combinations(case.names, length):
            for order in (needs, needs[::-1], list(needs)):
                got = case.backward(dy, x, *stats, weight, needs=order)
                assert len(got) == len(case.names)
                assert [g is not None for g in got] == [name in needs for name in case.names]
                assert_gradients(got, want)
    assert all(g is not None for g in everything)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_default_needs(case):
    """Only dx without a weight, everything with one."""
    x, dy, weight = case.x(), case.dy(), case.weight()
    stats = case.exact_stats(x)
    dx, *others = case.backward(dy, x, *stats)
    assert dx is not None
    assert others == [None] * len(others)
    assert_same_bits(case.backward(dy, x, *stats, weight), case.backward(dy, x, *stats, weight, needs=case.names))
    assert_same_bits(case.backward(dy, x, *stats, needs=None)[0], dx)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_parameter_gradients_at_ones(case):
    """Without a weight the gradients are those at a weight of ones, in the dtype of x."""
    for dtype in (F16, F32):
        x, dy = case.x(dtype), case.dy(dtype)
        stats = case.exact_stats(x)
        got = case.backward(dy, x, *stats, needs=case.names)
        assert all(g.dtype == dtype for g in got)
        ones = np.ones(case.param_shape, dtype)
        assert_gradients(got, case.exact_backward(dy, x, *stats, ones))


@pytest.mark.parametrize("param_dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_parameter_dtypes(case, dtype, param_dtype):
    """dweight and dbias have the dtype of weight, dx that of x."""
    x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(param_dtype)
    stats = case.exact_stats(x)
    got = case.backward(dy, x, *stats, weight)
    assert [g.dtype for g in got] == [dtype] + [param_dtype] * (len(got) - 1)
    # A float64 result of float32 cells is as good as float32 sums are.
    want = case.exact_backward(dy, x, *stats, weight)
    assert_gradients(got[:1], want)
    limit = 1e-12 if dtype == param_dtype == F64 else 1e-6
    for g, name in zip(got[1:], ("dweight", "dbias"), strict=False):
        assert_gradient(g, getattr(want, name), getattr(want, name + "_terms"), limit)


@pytest.mark.parametrize("stat", [F16, BF16, F32, F64, np.dtype(np.longdouble)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_statistics_dtypes(case, dtype, stat):
    """mean and rstd of any floating dtype, taken at their own value."""
    x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(dtype)
    stats = case.exact_stats(x, dtype=stat)
    got = case.backward(dy, x, *stats, weight)
    # Long double statistics are rounded to float64 first.
    given = [None if s is None else s.astype(F64) for s in stats]
    assert_gradients(got, case.exact_backward(dy, x, *given, weight))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype, size):
    for case in (
        layer((5, size)),
        rms((5, size)),
        layer((size, 5)),
        layer((size, 5), axis=0),
        group((2, 6, size), 3),
        group((2, size, 6), 3, channel_axis=-1),
        instance((2, 3, size)),
        instance((2, size, 3), channel_axis=-1),
        batch((3, 5, size)),
        batch((3, size, 5), channel_axis=-1),
        batch((5, size)),
        batch((5, size), training=False),
    ):
        x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(dtype)
        stats = case.exact_stats(x)
        got = case.backward(dy, x, *stats, weight)
        # In a very small reduction dx is what little eps leaves of terms that cancel.
        assert_gradients(got, case.exact_backward(dy, x, *stats, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        layer((2, 100_003)),
        rms((2, 100_003)),
        layer((20_011, 5)),
        layer((50_021, 2), axis=0),
        group((1, 4, 25_013), 2),
        instance((1, 50_021, 2), channel_axis=-1),
        batch((3, 2, 30_011)),
        batch((50_021, 3)),
        batch((2, 50_021)),
    ],
    ids=str,
)
def test_wide(case, dtype):
    x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(dtype)
    stats = case.exact_stats(x)
    assert_gradients(case.backward(dy, x, *stats, weight), case.exact_backward(dy, x, *stats, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in FEW if c.op != "rms_norm" and c.training], ids=str)
def test_vanishing_gradient(case, dtype):
    """A constant dy moves every output alike: dx is the rounding error of terms that cancel, and stays that small."""
    x = case.x(dtype)
    dy = case.ordered(np.full(case.shape, 0.7, dtype))
    stats = case.exact_stats(x)
    (dx, *_) = case.backward(dy, x, *stats)
    want = case.exact_backward(dy, x, *stats)
    assert_gradient(dx, want.dx, want.dx_terms)
    size = np.sqrt((dx.astype(F64) ** 2).sum())
    assert size <= 1e-6 * want.dx_terms


def test_the_comparison_notices_errors():
    """Negative control: gradients off by a few parts in a million, or by one 16-bit rounding more, are refused."""
    case = layer((7, 33))
    for dtype, factor in [(F32, 1 + 3e-6), (F64, 1 + 3e-12), (F16, 1 + 2e-3)]:
        x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(dtype)
        stats = case.exact_stats(x)
        got = case.backward(dy, x, *stats, weight)
        want = case.exact_backward(dy, x, *stats, weight)
        assert_gradients(got, want)
        for i in range(3):
            wrong = [None if i != j else (g.astype(F64) * factor).astype(dtype) for j, g in enumerate(got)]
            with pytest.raises(AssertionError, match="gradient off"):
                assert_gradients(wrong, want)
        assert not same_bits(got[0], got[0] * dtype.type(2))


@pytest.mark.parametrize("extreme", [None, 1e30, 1e-30])
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weight"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("make", [layer, rms])
@pytest.mark.parametrize("n", [2, 7, 8, 15, 16, 17, 40, 64, 100, 128, 129])
def test_short_rows(n, make, dtype, weighted, extreme):
    """They go sixteen at a time, the last ones and those that float32 cannot hold one by one: with the bits that they
    have beside dweight and dbias, and by themselves, in place and wherever dx begins. Rows of 129 float32
    go by themselves."""
    case = make((37, n))
    x, dy = case.x(dtype), case.dy(dtype)
    if extreme:
        for r in (3, 20, 36):
            x[r] = (x[r].astype(F64) * extreme).astype(dtype)
    weight = case.weight(dtype) if weighted else None
    stats = case.exact_stats(x)
    want = case.exact_backward(dy, x, *stats, weight)
    dx = case.backward(dy, x, *stats, weight, needs=("x",))[0]
    assert_gradient(dx, want.dx, want.dx_terms)
    everything = case.backward(dy, x, *stats, weight, needs=case.names)
    assert_gradients(everything, want)
    assert_same_bits(dx, everything[0])
    for r in (0, 3, 15, 16, 36):
        row = slice(r, r + 1)
        alone = case.backward(dy[row], x[row], *(s if s is None else s[row] for s in stats), weight, needs=("x",))
        assert_same_bits(alone[0], dx[row])
    room = np.zeros(dy.size + 1, dtype)
    for out in (dy.copy(), room[1:].reshape(dy.shape), room[:-1].reshape(dy.shape)):
        out[...] = dy
        case.backward(out, x, *stats, weight, needs=("x",), out=out)
        assert_same_bits(out, dx)
