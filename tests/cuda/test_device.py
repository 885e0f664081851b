# SPDX-License-Identifier: BSD-3-Clause

"""Results on a real device: the host suite's cases, in the arrays of every library that is installed."""

from __future__ import annotations

import _device
import numpy as np
import pytest
from _device import CASES, LIBRARIES, backward_problem, forward_problem, get, put, running, suits, ulps
from _window import window

import normfast as nf
from _cases import LAYOUTS, batch, group, instance, layer, rms
from _checks import (
    DTYPES,
    F16,
    F32,
    F64,
    assert_forward,
    assert_gradient,
    assert_gradients,
    assert_same_bits,
    assert_stats,
)

if (reason := _device.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def alive():
    yield
    _device.stop_if_lost()


@pytest.fixture(params=LIBRARIES)
def lib(request):
    return _device.open_library(request.param)


@pytest.fixture
def own():
    return _device.open_library("own")


# ---- every layout, dtype and library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_forward(lib, case):
    for dtype in filter(lambda dtype: suits(lib, case, dtype), DTYPES):
        for params in (False, True):
            x, weight, bias, want, stats = forward_problem(case, dtype, params)
            arguments = put(lib, x, weight, bias)
            got = get(lib, case.forward(*arguments, return_stats=True, **running(lib, case)))
            assert got[0].dtype == dtype
            assert_forward(got[0], want, ulps(dtype))
            assert_stats(got[1], got[2], stats, dtype)
            if lib.permuted:
                assert got[0].strides == x.strides
            assert_same_bits(lib.get(case.forward(*arguments, **running(lib, case))), got[0])


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_backward(lib, case):
    for dtype in filter(lambda dtype: suits(lib, case, dtype), DTYPES):
        arrays, want = backward_problem(case, dtype)
        arguments = put(lib, *arrays)
        got = get(lib, case.backward(*arguments))
        assert_gradients(got, want)
        assert got[0].dtype == dtype
        if lib.permuted:
            assert got[0].strides == arrays[1].strides
        for needs in (("x",), ("weight",), case.names[1:], ()):
            some = get(lib, case.backward(*arguments, needs=needs))
            assert [value is not None for value in some] == [name in needs for name in case.names]
            assert_gradients(some, want)  # not the same bits: dx alone has kernels of its own
        dx, *others = get(lib, case.backward(*arguments[:-1]))  # no weight
        assert others == [None] * len(others)
        assert_gradient(dx, *_without_weight(case, arrays))


def _without_weight(case, arrays):
    want = case.exact_backward(*arrays[:-1])
    return want.dx, want.dx_terms


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_then_backward(lib, case):
    """The statistics that came back go into backward as they are."""
    for dtype in filter(lambda dtype: suits(lib, case, dtype), DTYPES):
        x, weight, bias, _, stats = forward_problem(case, dtype)
        dy = case.dy(dtype)
        x_there, weight_there, bias_there, dy_there = put(lib, x, weight, bias, dy)
        _, mean, rstd = case.forward(x_there, weight_there, bias_there, return_stats=True, **running(lib, case))
        got = get(lib, case.backward(dy_there, x_there, mean, rstd, weight_there))
        # 16-bit x has float32 statistics, whose own rounding shows.
        limit = 2e-6 if dtype.itemsize == 2 else None
        assert_gradients(got, case.exact_backward(dy, x, stats.mean, stats.rstd, weight), limit)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_out(lib, case):
    x, weight, bias, want, _ = forward_problem(case, F32)
    arrays, wanted = backward_problem(case, F32)
    if not lib.writable:
        with pytest.raises(ValueError, match=r"^\w+: out must be writable, got a JAX array"):
            case.forward(*put(lib, x), out=lib.put(x), **running(lib, case))
        return
    weight_there, bias_there, *stats = put(lib, weight, bias, *arrays[2:4])
    rooms = [lib.put(np.full(case.shape, 99, F32))]
    if lib.permuted:
        rooms.append(lib.put(np.full(case.shape[::-1], 99, F32).T))
    if lib.strided:
        rooms.append(lib.put(np.full((*case.shape[:-1], case.shape[-1] * 3), 99, F32))[..., 1::3])
    for out in rooms:
        assert case.forward(lib.put(x), weight_there, bias_there, out=out, **running(lib, case)) is out
        assert_forward(lib.get(out), want, ulps(F32))
        got = case.backward(*put(lib, *arrays[:2]), *stats, weight_there, out=out)
        assert got[0] is out
        assert_gradients(get(lib, got), wanted)
    same = lib.put(x.copy())
    assert case.forward(same, weight_there, bias_there, out=same, **running(lib, case)) is same
    assert_forward(lib.get(same), want, ulps(F32))
    for place in (0, 1):
        given = put(lib, arrays[0].copy(), arrays[1].copy())
        got = case.backward(*given, *stats, weight_there, out=given[place])
        assert got[0] is given[place]
        assert_gradients(get(lib, got), wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_strided(lib, case):
    """Nothing contiguous: copies on the device."""
    if not lib.strided:
        pytest.skip("the library has no strided arrays")

    def spread(a):
        if a is None or a.ndim == 0:
            return a if a is None else lib.put(a)
        room = np.full((*a.shape[:-1], 2 * a.shape[-1]), 99, a.dtype)
        room[..., ::2] = a
        return lib.put(room)[..., ::2]

    for dtype in filter(lambda dtype: suits(lib, case, dtype), DTYPES):
        x, weight, bias, want, _ = forward_problem(case, dtype)
        arrays, wanted = backward_problem(case, dtype)
        kw = {} if case.training else {"running": tuple(spread(a) for a in case.running())}
        assert_forward(lib.get(case.forward(spread(x), spread(weight), spread(bias), **kw)), want, ulps(dtype))
        assert_gradients(get(lib, case.backward(*(spread(a) for a in arrays))), wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameter_dtypes(lib, case):
    for dtype in filter(lambda dtype: suits(lib, case, dtype), DTYPES):
        for param in (F32, F64):
            x, weight, bias = case.x(dtype), case.weight(param), case.bias(param)
            y = lib.get(case.forward(*put(lib, x, weight, bias), **running(lib, case)))
            assert y.dtype == dtype
            assert_forward(y, case.exact_forward(x, weight, bias), ulps(dtype))
            arrays, _ = backward_problem(case, dtype)
            got = get(lib, case.backward(*put(lib, *arrays[:-1], weight)))
            assert all(g.dtype == param for g in got[1:])
            want = case.exact_backward(*arrays[:-1], weight)
            for g, name in zip(got, ("dx", "dweight", "dbias"), strict=False):
                limit = 1e-12 if dtype == param == F64 else 1e-6
                assert_gradient(g, getattr(want, name), getattr(want, name + "_terms"), limit)


@pytest.mark.parametrize("shape", [(6, 4, 10), (6, 10, 4), (600, 3), (16, 3, 5000)], ids=str)
def test_running_statistics_of_batch_norm(lib, shape):
    axis = -1 if shape == (6, 10, 4) else 1
    x = batch(shape, channel_axis=axis).x()
    channels = np.moveaxis(x, axis, 0).reshape(shape[axis], -1).astype(F64)
    if not lib.writable:
        with pytest.raises(ValueError, match=r"^batch_norm: running_mean must be writable"):
            nf.batch_norm(*put(lib, x, *np.ones((2, shape[axis]), F32)), training=True, channel_axis=axis)
        return
    for dtype in (F32, F64):
        for ddof in (0, 1):
            given = put(lib, np.zeros(shape[axis], dtype), np.ones(shape[axis], dtype))
            nf.batch_norm(lib.put(x), *given, training=True, decay=0.75, running_ddof=ddof, channel_axis=axis)
            mean, var = get(lib, given)
            np.testing.assert_allclose(mean, 0.25 * channels.mean(1), rtol=1e-6)
            np.testing.assert_allclose(var, 0.75 + 0.25 * channels.var(1, ddof=ddof), rtol=1e-6)


@pytest.mark.parametrize("kind", ["bool", "int8", "int16", "int32", "int64", "uint8", "uint32"])
def test_integers(lib, kind):
    x = (np.arange(60).reshape(5, 12) % 7).astype(kind)
    y = lib.get(nf.layer_norm(lib.put(x)))
    assert y.dtype == F64
    np.testing.assert_allclose(y, nf.reference.layer_norm(x.astype(F64)), atol=1e-12)


def test_nothing_to_do(own):
    x, stats = np.zeros((0, 8), F32), np.zeros((0, 1))
    y, mean, _ = get(own, nf.layer_norm(own.put(x), return_stats=True))
    assert y.shape == (0, 8)
    assert mean.shape == (0, 1)
    got = get(own, nf.layer_norm_backward(*put(own, x, x, stats, stats, np.ones(8, F32))))
    assert got[0].shape == (0, 8)
    assert not got[1].any()
    assert not got[2].any()


# ---- sizes -----------------------------------------------------------------------------------------------------------

SIZES = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 257, 511, 513, 1023, 1024, 1025]


def _check(own, case, dtype):
    x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
    there = put(own, x, weight, bias)
    y, mean, rstd = get(own, case.forward(*there, return_stats=True, **running(own, case)))
    want = case.exact_forward(x, weight, bias)
    assert_forward(y, want, ulps(dtype))
    assert_stats(mean, rstd, want, dtype)
    dy, stats = case.dy(dtype), case.exact_stats(x)
    got = get(own, case.backward(*put(own, dy, x, *stats, weight)))
    assert_gradients(got, case.exact_backward(dy, x, *stats, weight))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"])
def test_sizes(own, op, dtype, size):
    cases = {
        "layer_norm": [layer((5, size)), layer((size, 5)), layer((size, 5), axis=0), layer((2, size, 3), axis=1)],
        "rms_norm": [rms((5, size)), rms((size, 3)), rms((size, 5), axis=0)],
        "group_norm": [group((2, 6, size), 3), group((2, size, 6), 3, channel_axis=-1), group((2, 2 * size, 5), 2)],
        "instance_norm": [instance((2, 3, size)), instance((2, size, 3), channel_axis=-1), instance((2, size, 5))],
        "batch_norm": [
            batch((3, 5, size)),
            batch((3, size, 5), channel_axis=-1),
            batch((5, size)),
            batch((5, size), training=False),
        ],
    }
    for case in cases[op]:
        _check(own, case, dtype)


LONG = [2047, 2048, 4096, 4099, 8192, 8193, 12288, 16384, 20_001, 32_768, 50_021, 65_536, 100_003, 262_144, 1_000_000]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", LONG)
@pytest.mark.parametrize("make", [layer, rms], ids=["layer_norm", "rms_norm"])
def test_long_rows(own, make, size, dtype):
    """Rows in registers, in shared memory, across a cluster, and larger than the chip."""
    if size > 300_000 and dtype == F64:
        pytest.skip("float64 is not tuned; the shorter rows take the same path")
    _check(own, make((3 if size < 60_000 else 2, size)), dtype)


@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        layer((20_011, 9)),
        layer((4099, 257)),
        layer((4099, 9), axis=0),
        layer((50_021, 2), axis=0),
        layer((2, 20_011, 3), axis=1),
        rms((100_003, 8)),
        rms((1031, 768)),
        group((1, 4, 25_013), 2),
        group((2, 64, 33, 31), 32),
        group((2, 33, 31, 64), 32, channel_axis=-1),
        group((2, 48, 30_000), 2),
        instance((67, 6, 61)),
        instance((1, 2, 150_001)),
        instance((1, 50_021, 2), channel_axis=-1),
        instance((2, 70, 70, 40), channel_axis=-1),
        batch((67, 6, 61)),
        batch((3, 2, 70_011)),
        batch((40_009, 6)),
        batch((2, 50_021)),
        batch((8, 64, 49)),
        batch((8, 7, 7, 64), channel_axis=-1),
        batch((4, 100, 100, 24), channel_axis=-1),
    ],
    ids=str,
)
def test_large(own, case, dtype):
    _check(own, case, dtype)


# ---- any start in memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", range(1, 9))
@pytest.mark.parametrize("case", [*CASES, layer((3, 4099)), layer((2, 33_001)), instance((2, 3, 1031))], ids=str)
def test_misaligned(own, case, shift):
    """The address of the first element changes nothing, and nothing is written beside the array."""
    for dtype in (F32, F16):
        x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
        kw = running(own, case)
        want = own.get(case.forward(*put(own, x, weight, bias), **kw))
        moved = [None if a is None else window(own.put, a, start=shift) for a in (x, weight, bias)]
        assert_same_bits(own.get(case.forward(*moved, **kw)), want)
        room = window(own.put, np.zeros_like(x), start=shift)
        assert case.forward(*moved, out=room, **kw) is room
        assert_same_bits(room.numpy(), want)
        assert (room.base.numpy()[:shift] == 99).all()
        arrays = case.dy(dtype), x, *case.exact_stats(x), weight
        want = get(own, case.backward(*put(own, *arrays)))
        moved = [None if a is None else window(own.put, a, start=shift) for a in arrays]
        assert_same_bits(get(own, case.backward(*moved)), want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_windows(own, case):
    """Strided arrays that offer only the array interface."""
    for dtype in (F16, F32, F64):
        x, weight, bias, want, _ = forward_problem(case, dtype)
        parts = [None if a is None else window(own.put, a, start=1, step=3) for a in (x, weight, bias)]
        assert_forward(own.get(case.forward(*parts, **running(own, case))), want, ulps(dtype))
