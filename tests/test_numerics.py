"""Promise 2: the accuracy of results, whatever the mean and the scale of the data."""

from __future__ import annotations

import numpy as np
import pytest

import normfast as nf
from _cases import batch, group, instance, layer, rms, rng
from _checks import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    NARROW,
    assert_forward,
    assert_gradients,
    assert_same_bits,
    assert_stats,
)

CASES = [
    layer((5, 1031)),
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
OFFSETS = [0, 1, 1e2, 1e4, 1e5, 1e6, -1e6]


def forward_and_backward(case, x, *, eps=None, ulps=None, weighted=True):
    weight, bias = (case.weight(), case.bias()) if weighted else (None, None)
    eps = case.eps if eps is None else eps
    y, mean, rstd = case.forward(x, weight, bias, eps=eps, return_stats=True)
    want = case.exact_forward(x, weight, bias, eps=eps)
    assert_forward(y, want, ulps)
    assert_stats(mean, rstd, want, x.dtype)
    dy = case.dy()
    got = case.backward(dy, x, mean, rstd, weight)
    # Against the gradient of the true statistics, not of those that came back.
    assert_gradients(got, case.exact_backward(dy, x, want.mean, want.rstd, weight))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_offsets(case, offset):
    """float32 data up to a million standard deviations from zero."""
    forward_and_backward(case, case.x(mean=offset, std=1.0))
    forward_and_backward(case, case.x(mean=offset, std=1.0), eps=0, weighted=False)


@pytest.mark.parametrize("scale", [1e30, 1e15, 1e-15, 1e-25])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scales(case, scale):
    """At eps=0 the scale of the data drops out: squares that overflow or vanish in float32 must not show."""
    x = case.x(mean=2.0, std=1.0, dtype=F64) * scale
    y, mean, rstd = case.forward(x.astype(F32), eps=0, return_stats=True)
    want = case.exact_forward(x.astype(F32), eps=0)
    assert_forward(y, want)
    assert_stats(mean, rstd, want, F32)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e30, 1e36])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scales_with_large_and_small_weights(case, scale):
    """rstd*weight leaves the range of float32 although rstd, weight and the result are within it."""
    x = (case.x(F64) * scale).astype(F32)
    for factor in (1e4, 1e-4):
        weight = (case.weight(F64) * factor).astype(F32)
        assert_forward(case.forward(x, weight, eps=0), case.exact_forward(x, weight, eps=0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_denormals(case):
    """Data below the smallest normal float32, whose cells have few bits each."""
    x = (case.x(F64, mean=0.3, std=1.0) * 1e-40).astype(F32)
    y = case.forward(x, eps=0)
    assert_forward(y, case.exact_forward(x, eps=0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_near_the_largest_number(case):
    """Sums and differences of cells overflow float32, the result does not."""
    x = (np.sign(case.x(mean=0.0)) * rng(5).uniform(2.2e38, 3.3e38, case.shape)).astype(F32)
    assert_forward(case.forward(x, eps=0), case.exact_forward(x, eps=0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_leading_outliers(case):
    """The first cells of every reduction far from the rest: a bad guess of where the data lie."""
    rows = case.geometry
    for count in (1, 16, 64):
        x = case.x()
        flat = x.reshape(-1)
        flat[rows.cells[:, :count]] += 1e6
        forward_and_backward(case, flat.reshape(case.shape), eps=0, weighted=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outlier_at_the_end(case):
    x = case.x()
    flat = x.reshape(-1)
    flat[case.geometry.cells[:, -1]] = -1e7
    forward_and_backward(case, flat.reshape(case.shape), weighted=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ramps(case):
    """Cells that grow steadily: the running mean of what was seen is always behind."""
    ramp = np.linspace(-3e4, 5e5, case.geometry.cells.shape[1])
    x = np.empty(int(np.prod(case.shape)))
    x[case.geometry.cells] = ramp
    forward_and_backward(case, x.reshape(case.shape).astype(F32))


@pytest.mark.parametrize("values", [(0.1, 0.3), (1e6, 1e6 + 0.25), (-1, 3.7), (16777215.0, 16777216.0)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_values(case, values):
    """Rounding errors of equal terms all point the same way; there is nothing that they could average out with."""
    pick = rng(7).random(case.shape) < 0.37
    x = np.where(pick, *values).astype(F32)
    forward_and_backward(case, x, weighted=False)


@pytest.mark.parametrize("value", [0.0, 0.1, -1.7, 3e4, 1e-7, 7.0, 1e-170])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.op != "rms_norm"], ids=str)
def test_constants(case, dtype, value):
    """Constant data give exactly bias, 0 without one, with eps=0 too; the mean is the constant itself."""
    if case.op == "batch_norm":
        # Each channel its own constant.
        shape = [1] * len(case.shape)
        shape[case.channel_axis] = -1
        each = (np.arange(case.param_shape[0]) * 0.37 + value).reshape(shape)
    else:
        each = value
    x = np.broadcast_to(np.asarray(each, F64), case.shape).astype(dtype)
    weight, bias = case.weight(dtype), case.bias(dtype)
    spread = np.empty(case.shape, dtype)
    spread.reshape(-1)[case.geometry.cells] = bias.reshape(-1)[case.geometry.params]
    for eps in (0.0, 1e-5):
        y, mean, _ = case.forward(x, weight, bias, eps=eps, return_stats=True)
        assert_same_bits(y, spread)
        assert_same_bits(mean, case.exact_forward(x).mean.astype(mean.dtype))
        y = case.forward(x, eps=eps)
        assert y.dtype == dtype
        assert not y.astype(F64).any()
        assert not case.forward(x, weight, eps=eps).astype(F64).any()


@pytest.mark.parametrize("value", [1e30, -3e38, 1e-25, 1e-45, 16777217.0, 1e6 / 3])
@pytest.mark.parametrize("width", [1, 2, 3, 67, 1024, 10_007])
def test_extreme_constants(value, width):
    bias = layer((2, width)).bias()
    x = np.full((2, width), value, F32)
    for eps in (0.0, 1e-5):
        assert_same_bits(nf.layer_norm(x, None, bias, eps=eps), np.broadcast_to(bias, x.shape))
        if width > 1:
            assert_same_bits(nf.batch_norm(x.T, training=True, eps=eps), np.zeros_like(x.T))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_of_constant_data(case):
    """At eps=0 the output of constant data does not depend on x: no NaN, no gradient."""
    x = np.full(case.shape, 0.0 if case.op == "rms_norm" else 0.1, F32)
    dy, weight = case.dy(), case.weight()
    y, mean, rstd = case.forward(x, weight, eps=0, return_stats=True)
    assert not y.any()
    assert np.isposinf(rstd).all()
    got = case.backward(dy, x, mean, rstd, weight)
    assert not got[0].any()
    assert not got[1].any()
    assert_gradients(got, case.exact_backward(dy, x, mean, rstd, weight))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_16_bit_is_rounded_once(case, dtype):
    """The result is the rounded float32-accurate one: nearly every cell is the rounded exact value."""
    for mean in (0.0, 0.7, 30.0):
        x, weight, bias = case.x(dtype, mean=mean), case.weight(dtype), case.bias(dtype)
        want = case.exact_forward(x, weight, bias)
        y = case.forward(x, weight, bias)
        assert_forward(y, want)
        rounded = want.y.astype(F64).astype(dtype)
        assert (y != rounded).mean() <= 0.005
        wide = case.forward(x.astype(F32), weight.astype(F32), None if bias is None else bias.astype(F32))
        assert (y != wide.astype(dtype)).mean() <= 0.005


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_16_bit_gradients_are_rounded_once(case, dtype):
    x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(dtype)
    stats = case.exact_stats(x)
    want = case.exact_backward(dy, x, *stats, weight)
    for got, exact in zip(case.backward(dy, x, *stats, weight), (want.dx, want.dweight, want.dbias), strict=False):
        differ = (got != exact.astype(F64).astype(dtype)).sum()
        assert differ <= max(1, 0.01 * got.size)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_16_bit_extremes(dtype):
    """The ends of the format: the largest numbers do not overflow inside, the smallest do not vanish."""
    largest = float(np.finfo(np.float16).max) if dtype == F16 else 3.3e38
    smallest = 6e-8 if dtype == F16 else 1e-40
    for case in CASES:
        signs = rng(3).choice([-1.0, 1.0], case.shape)
        x = (signs * rng(4).uniform(0.6, 1, case.shape) * largest).astype(dtype)
        assert_forward(case.forward(x, eps=0), case.exact_forward(x, eps=0))
        x = np.round(case.x(F64) * 50) * smallest
        x = x.astype(dtype)
        assert_forward(case.forward(x, eps=0), case.exact_forward(x, eps=0))


def test_16_bit_overflow_is_infinity():
    """A weight that takes the result past the largest float16 gives infinity, as a rounding does."""
    x = np.array([[-1.0, 1.0]], F16)
    y = nf.layer_norm(x, np.array([6e4, 1e5], F32), eps=0)
    assert y.tolist() == [[-60000.0, np.inf]]


@pytest.mark.parametrize("offset", [0, 1, 1e2, 1e4, -1e4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(case, offset):
    """Within 16 ulp up to a mean of 10^4 standard deviations; measured in long double."""
    if np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("long double of this platform is float64: nothing to measure by")
    x = case.x(F64, mean=offset, std=1.0)
    weight, bias = case.weight(F64), case.bias(F64)
    for eps in (0.0, 1e-5):
        y, mean, rstd = case.forward(x, weight, bias, eps=eps, return_stats=True)
        assert_forward(y, case.exact_forward(x, weight, bias, eps=eps))
    dy = case.dy(F64)
    assert_gradients(
        case.backward(dy, x, mean, rstd, weight), case.exact_backward(dy, x, mean, rstd, weight), limit=1e-13
    )


@pytest.mark.parametrize("scale", [1e120, 1e-120])
def test_float64_scales(scale):
    for case in CASES:
        x = case.x(F64) * scale
        assert_forward(case.forward(x, eps=0), case.exact_forward(x, eps=0))


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
@pytest.mark.parametrize("width", [1, 2, 10, 10**3, 10**5, 10**6])
def test_widths_to_a_million(width, offset):
    for case in (layer((2, width)), layer((width, 2), axis=0), rms((1, width)), instance((1, 2, width))):
        forward_and_backward(case, case.x(mean=offset, std=1.0))
    if width > 1:
        for case in (batch((width, 2)), batch((2, 1, max(width // 2, 1)))):
            forward_and_backward(case, case.x(mean=offset, std=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1e6])
def test_sixteen_million_cells_of_one_reduction(offset):
    """Rounding errors must not grow with the number of cells."""
    for case in (layer((1, 1 << 24)), batch((1 << 23, 2))):
        x = case.x(mean=offset, std=1.0)
        want = _float64(case, x)
        y = case.forward(x)
        step = np.spacing(np.abs(y).max())
        assert np.abs(y - want).max() <= 3 * step


def _float64(case, x):
    """The exact result to float64, good enough for these sizes and a quarter of the memory of long double."""
    axes = tuple(a for a in range(x.ndim) if a not in ((0,) if case.op == "layer_norm" else (1,)))
    wide = x.astype(F64)
    centred = wide - wide.mean(axis=axes, keepdims=True)
    centred -= centred.mean(axis=axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=axes, keepdims=True) + case.eps)


def test_bfloat16_far_from_zero():
    """Eight bits of mantissa, mean a hundred times the spread: the data are coarse, the result is not."""
    for case in CASES:
        x = case.x(BF16, mean=100.0, std=1.0)
        weight = case.weight(F32)
        assert_forward(case.forward(x, weight), case.exact_forward(x, weight))
