"""Inputs however they lie in memory: strided, reversed, broadcast, byteswapped, misaligned, permuted, read-only."""

from __future__ import annotations

import numpy as np
import pytest

from _cases import LAYOUTS, batch, data, group, instance, layer, rms
from _checks import BF16, DTYPES, F16, F32, F64, assert_forward, assert_gradients, assert_same_bits

CASES = [
    layer((6, 33)),
    layer((3, 5, 8), axis=1),
    rms((6, 33)),
    group((3, 6, 10), 2),
    group((3, 10, 6), 2, channel_axis=-1),
    instance((3, 4, 10)),
    batch((6, 4, 10)),
    batch((6, 10, 4), channel_axis=-1),
    batch((6, 4, 10), training=False),
]


def strided(a):
    """Every second cell along the last axis, every third along the others."""
    steps = [3] * (a.ndim - 1) + [2]
    room = np.full([n * step for n, step in zip(a.shape, steps, strict=True)], 99, a.dtype)
    view = room[tuple(slice(None, None, step) for step in steps)]
    view[...] = a
    return view


def reversed_(a):
    """Negative strides along every axis."""
    flip = (slice(None, None, -1),) * a.ndim
    return np.ascontiguousarray(a[flip])[flip]


def fortran(a):
    return np.asfortranarray(a)


def misaligned(a):
    """Cells that begin at an odd address."""
    buffer = bytearray(1 + a.nbytes)
    view = np.frombuffer(buffer, a.dtype, offset=1).reshape(a.shape)
    view[...] = a
    assert a.dtype.itemsize == 1 or not view.flags.aligned
    return view


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def byteswapped(a):
    # bfloat16 of ml_dtypes has no other byte order.
    return a if a.dtype == BF16 else a.astype(a.dtype.newbyteorder("S"))


def offset_by_one_cell(a):
    """Aligned to a cell, not to a vector."""
    view = np.empty(a.size + 1, a.dtype)[1:].reshape(a.shape)
    view[...] = a
    return view


WAYS = [strided, reversed_, fortran, misaligned, read_only, byteswapped, offset_by_one_cell]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype, way):
    """x, weight and bias in any memory; the result is exact and native, and nothing was changed."""
    x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
    want = case.exact_forward(x, weight, bias)
    given = [a if a is None else way(a) for a in (x, weight, bias)]
    before = [a if a is None else a.copy() for a in given]
    for arguments in ((given[0], weight, bias), (x, *given[1:]), given):
        y = case.forward(*arguments)
        assert y.dtype == dtype
        assert y.dtype.isnative
        assert_forward(y, want)
    assert_same_bits(tuple(given), tuple(before))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, dtype, way):
    x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(dtype)
    mean, rstd = case.exact_stats(x)
    want = case.exact_backward(dy, x, mean, rstd, weight)
    changed = [a if a is None else way(a) for a in (dy, x, mean, rstd, weight)]
    before = [a if a is None else a.copy() for a in changed]
    plain = [dy, x, mean, rstd, weight]
    for which in ((0,), (1,), (2, 3), (4,), (0, 1, 2, 3, 4)):
        got = case.backward(*(changed[i] if i in which else plain[i] for i in range(5)))
        assert all(g.dtype == dtype for g in got)
        assert all(g.dtype.isnative for g in got)
        assert_gradients(got, want)
    assert_same_bits(tuple(changed), tuple(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_broadcast_inputs(case, dtype):
    """Strides of zero: x the same in every sample, dy and the parameters the same everywhere."""
    x = np.broadcast_to(case.x(dtype)[:1], case.shape)
    weight = np.broadcast_to(case.weight(dtype).reshape(-1)[:1].reshape((1,) * len(case.param_shape)), case.param_shape)
    bias = weight if case.has_bias else None
    assert_forward(case.forward(x, weight, bias), case.exact_forward(x, weight, bias))
    dy = np.broadcast_to(case.dy(dtype)[:1], case.shape)
    stats = case.exact_stats(x)
    assert_gradients(case.backward(dy, x, *stats, weight), case.exact_backward(dy, x, *stats, weight))


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_x_and_dy_in_different_orders(case):
    """dx has the memory order of x, whatever that of dy."""
    for dtype in (F32, BF16):
        x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(dtype)
        stats = case.exact_stats(x)
        want = case.exact_backward(dy, x, *stats, weight)
        for other in (np.asfortranarray(dy), np.ascontiguousarray(dy), strided(dy)):
            got = case.backward(other, x, *stats, weight)
            assert_gradients(got, want)
            assert got[0].strides == x.strides


SMALL = [
    layer((3, 4, 6)),
    layer((3, 4, 6), axis=1),
    layer((3, 4, 6), axis=(0, 2)),
    rms((3, 4, 6)),
    group((3, 4, 6), 2),
    group((3, 4, 6), 2, channel_axis=-1),
    instance((3, 4, 6)),
    batch((3, 4, 6)),
    batch((3, 4, 6), training=False),
]
ORDERS = [(2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)]


@pytest.mark.parametrize("permutation", ORDERS, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_memory_order_of_results(case, permutation):
    """Results lie as x does where x is a permuted contiguous array."""
    case = case.with_(permutation=permutation)
    for dtype in (F32, F16):
        x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
        y = case.forward(x, weight, bias)
        assert y.strides == x.strides
        assert_forward(y, case.exact_forward(x, weight, bias))
        stats = case.exact_stats(x)
        got = case.backward(dy, x, *stats, weight)
        assert got[0].strides == x.strides
        assert_gradients(got, case.exact_backward(dy, x, *stats, weight))


@pytest.mark.parametrize("way", [strided, reversed_])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_c_order_otherwise(case, way):
    """A view with holes or of negative strides is no permuted contiguous array: its results are in C order."""
    x = way(case.x())
    assert case.forward(x).flags.c_contiguous
    stats = case.exact_stats(x)
    assert case.backward(case.dy(), x, *stats)[0].flags.c_contiguous
    sliced = np.asfortranarray(data((8, *case.shape[1:])))[: case.shape[0]]
    assert not sliced.flags.f_contiguous
    assert case.forward(sliced).flags.c_contiguous


def test_axes_of_length_one():
    """Their strides mean nothing: the result is contiguous in the order of the others."""
    x = np.asfortranarray(data((4, 1, 5)))
    y = layer((4, 1, 5), axis=(0, 2)).forward(x)
    assert y.flags.f_contiguous
    x = data((1, 4, 5))
    assert layer((1, 4, 5)).forward(x).flags.c_contiguous
    assert batch((1, 4, 5)).forward(x[:, :, ::1]).flags.c_contiguous


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_running_statistics_however_they_lie(dtype, way):
    """Read in evaluation; read and written in training."""
    case = batch((6, 4, 10), training=False)
    x = case.x(dtype if dtype in (F16, BF16) else F32)
    plain = case.running(dtype)
    assert_same_bits(case.forward(x, running=tuple(map(way, plain))), case.forward(x, running=plain))
    if way is read_only:
        return
    case, laid = case.with_(training=True), tuple(map(way, plain))
    case.forward(x, running=laid), case.forward(x, running=plain)
    assert_same_bits(tuple(a.astype(dtype) for a in laid), plain)


@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=str)
def test_six_dimensions(dtype):
    for permutation in ((0, 1, 2, 3, 4, 5), (5, 3, 1, 0, 2, 4)):
        for case in (
            layer((2, 3, 4, 2, 3, 5), axis=(1, 3, 5), permutation=permutation),
            rms((2, 3, 4, 2, 3, 5), axis=(0, 4), permutation=permutation),
            group((2, 3, 4, 2, 3, 5), 2, channel_axis=2, permutation=permutation),
            batch((2, 3, 4, 2, 3, 5), channel_axis=3, permutation=permutation),
        ):
            x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
            assert_forward(case.forward(x, weight, bias), case.exact_forward(x, weight, bias))
            stats = case.exact_stats(x)
            assert_gradients(case.backward(dy, x, *stats, weight), case.exact_backward(dy, x, *stats, weight))
