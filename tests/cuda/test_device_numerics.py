# SPDX-License-Identifier: BSD-3-Clause

"""The promises about bits and digits on a real device: same bits, batch invariance, any mean and scale, NaN."""

from __future__ import annotations

import _device
import numpy as np
import pytest
from _device import get, put, running, ulps

from _cases import batch, group, instance, layer, rms
from _checks import BF16, DTYPES, F16, F32, F64, assert_forward, assert_gradients, assert_same_bits, assert_stats

if (reason := _device.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

CASES = [
    layer((5, 1031)),
    layer((3, 9001)),
    layer((2, 70_001)),
    layer((1031, 5), axis=0),
    layer((3, 67, 31), axis=1),
    rms((5, 1031)),
    rms((1031, 5), axis=0),
    group((2, 6, 301), 2),
    group((2, 301, 6), 2, channel_axis=-1),
    instance((2, 3, 517)),
    instance((2, 517, 3), channel_axis=-1),
    batch((5, 3, 211)),
    batch((5, 211, 3), channel_axis=-1),
    batch((1031, 5)),
]


@pytest.fixture(autouse=True)
def alive():
    yield
    _device.stop_if_lost()


@pytest.fixture
def own():
    return _device.open_library("own")


def run(lib, case, x, dy, weight, bias):
    """y, mean, rstd, dx, dweight, dbias; backward from the statistics that forward returned."""
    x, dy, weight, bias = put(lib, x, dy, weight, bias)
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True, **running(lib, case))
    return get(lib, (y, mean, rstd, *case.backward(dy, x, mean, rstd, weight)))


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["own", "torch"])
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        layer((3001, 768)),
        rms((70_001, 64)),
        layer((301, 5000)),
        group((16, 32, 41, 41), 8),
        batch((32, 24, 41, 41)),
        batch((32, 41, 41, 24), channel_axis=-1),
        layer((9001, 40), axis=0),
    ],
    ids=str,
)
def test_same_bits_on_every_run(name, case):
    lib = _device.open_library(name)
    for dtype in (F32, BF16):
        arrays = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
        first = run(lib, case, *arrays)
        for _ in range(3):
            assert_same_bits(run(lib, case, *arrays), first)


SAMPLES = [
    layer((531, 96)),
    layer((531, 1031)),
    layer((67, 9001)),
    layer((19, 60_001)),
    layer((5, 300_007)),
    layer((37, 19, 23), axis=1),
    rms((531, 96)),
    rms((2000, 1)),
    rms((67, 5120)),
    group((37, 24, 65), 4),
    group((37, 65, 24), 4, channel_axis=-1),
    group((19, 32, 2500), 2),
    instance((37, 12, 65)),
    instance((37, 65, 12), channel_axis=-1),
    instance((19, 4, 9001)),
]


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_a_batch_of_one_and_of_many(own, case):
    """The bits of a sample do not depend on how many there are, nor on its place."""
    for dtype in DTYPES if np.prod(case.shape) < 1e6 else (F32, BF16):
        x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
        whole = run(own, case, x, dy, weight, bias)[:4]
        n = case.shape[0]
        for start, stop in ((0, 1), (n // 2, n // 2 + 1), (n - 1, n), (1, 1 + n // 3), (n - 5, n)):
            some = run(own, case, x[start:stop], dy[start:stop], weight, bias)[:4]
            assert_same_bits(some, tuple(None if r is None else r[start:stop] for r in whole))


@pytest.mark.parametrize(
    "case", [layer((67, 37), axis=0), layer((5, 19, 37), axis=(0, 1)), rms((1031, 37), axis=0)], ids=str
)
def test_columns_alone_and_together(own, case):
    for dtype in (F32, F16):
        x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
        whole = run(own, case, x, dy, weight, bias)[:4]
        for columns in (slice(0, 1), slice(17, 18), slice(36, 37), slice(-16, None), slice(3, 20)):
            some = [np.ascontiguousarray(a[..., columns]) for a in (x, dy)]
            got = run(own, case, *some, weight, bias)[:4]
            assert_same_bits(got, tuple(None if r is None else r[..., columns] for r in whole))


# ---- digits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6, -1e6])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_offsets(own, case, offset):
    """float32 data up to a million standard deviations from zero."""
    for eps, weighted in ((case.eps, True), (0, False)):
        x, dy = case.x(mean=offset, std=1.0), case.dy()
        weight, bias = (case.weight(), case.bias()) if weighted else (None, None)
        x_there, weight_there, bias_there = put(own, x, weight, bias)
        y, mean, rstd = case.forward(x_there, weight_there, bias_there, eps=eps, return_stats=True)
        want = case.exact_forward(x, weight, bias, eps=eps)
        assert_forward(own.get(y), want, ulps(F32))
        assert_stats(*get(own, (mean, rstd)), want, F32)
        got = get(own, case.backward(own.put(dy), x_there, mean, rstd, weight_there))
        assert_gradients(got, case.exact_backward(dy, x, want.mean, want.rstd, weight))


@pytest.mark.parametrize("scale", [1e30, 1e15, 1e-15, 1e-25])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scales(own, case, scale):
    """At eps=0 the scale of the data drops out, also where squares overflow or vanish in float32."""
    x = (case.x(F64, mean=2.0, std=1.0) * scale).astype(F32)
    y, mean, rstd = get(own, case.forward(own.put(x), eps=0, return_stats=True))
    want = case.exact_forward(x, eps=0)
    assert_forward(y, want, ulps(F32))
    assert_stats(mean, rstd, want, F32)


@pytest.mark.parametrize("value", [0.0, 3.3, -1e30, 1e-30, 65504.0])
@pytest.mark.parametrize("case", [c for c in CASES if c.has_mean], ids=str)
def test_constants(own, case, value):
    """Exactly the bias, in every dtype, with eps=0 too."""
    for dtype in DTYPES if abs(value) in (0.0, 3.3, 65504.0) else (F32, F64):
        x = case.ordered(np.full(case.shape, value, dtype))
        bias = case.bias(dtype)
        for eps in (0, case.eps):
            assert not own.get(case.forward(own.put(x), eps=eps)).any()
            y = own.get(case.forward(own.put(x), None, own.put(bias), eps=eps))
            rows = y.reshape(-1)[case.geometry.cells]
            assert (rows == bias.reshape(-1)[case.geometry.params]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "case",
    [
        layer((21, 67)),
        layer((5, 9001)),
        layer((67, 21), axis=0),
        layer((3, 67, 7), axis=1),
        rms((21, 67)),
        group((3, 14, 9), 7),
        group((3, 9, 14), 7, channel_axis=-1),
        instance((3, 7, 19)),
        instance((3, 19, 7), channel_axis=-1),
        batch((5, 21, 9)),
        batch((5, 9, 21), channel_axis=-1),
    ],
    ids=str,
)
def test_nan_stays_in_its_reduction(own, case, value):
    cells = case.geometry.cells
    for dtype in (F32, BF16):
        x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
        arrays = case.dy(dtype), x, *case.exact_stats(x), weight
        weight_there, bias_there = put(own, weight, bias)
        clean = own.get(case.forward(own.put(x), weight_there, bias_there))
        clean_dx = own.get(case.backward(*put(own, *arrays))[0])
        for reduction in (0, len(cells) // 2, len(cells) - 1):
            bad = x.copy()
            bad.reshape(-1)[cells[reduction, cells.shape[1] // 2]] = value
            others = np.delete(cells, reduction, axis=0)
            y = own.get(case.forward(own.put(bad), weight_there, bias_there))
            assert_same_bits(y.reshape(-1)[others], clean.reshape(-1)[others])
            lost = y.reshape(-1)[cells[reduction]].astype(F64)
            assert (np.isnan(lost) | ((lost == 0) & (case.op == "rms_norm") & np.isinf(value))).all()
            for place in (0, 1):
                some = list(arrays)
                some[place] = arrays[place].copy()
                some[place].reshape(-1)[cells[reduction, 0]] = value
                dx = own.get(case.backward(*put(own, *some))[0])
                assert_same_bits(dx.reshape(-1)[others], clean_dx.reshape(-1)[others])
