"""Promise 3: parameter gradients are accumulated in float32 or better and rounded once."""

from __future__ import annotations

import numpy as np
import pytest

import normfast as nf
from _cases import batch, data, group, instance, layer, rms
from _checks import BF16, F16, F32, F64, NARROW, assert_gradient, assert_gradients

TALL = [
    layer((4099, 9)),
    rms((4099, 9)),
    layer((9, 4099), axis=0),
    group((67, 6, 61), 3),
    group((67, 61, 6), 3, channel_axis=-1),
    instance((67, 6, 61)),
    batch((67, 6, 61)),
    batch((4099, 6)),
]


def positive_dy(case, dtype):
    """About one everywhere: the sums grow far beyond what a 16-bit accumulator can add to."""
    return case.ordered(data(case.shape, dtype, 1, mean=1.0, std=0.1))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", TALL, ids=str)
def test_many_rows(case, dtype):
    x, dy, weight = case.x(dtype), positive_dy(case, dtype), case.weight(dtype)
    stats = case.exact_stats(x)
    got = case.backward(dy, x, *stats, weight)
    want = case.exact_backward(dy, x, *stats, weight)
    assert_gradients(got, want)
    for g, exact in zip(got[1:], (want.dweight, want.dbias), strict=False):
        # Rounded once: the nearest 16-bit number, save for a rare tie that float32 decides otherwise.
        assert (g != exact.astype(F64).astype(dtype)).sum() <= 1


@pytest.mark.parametrize("case", TALL, ids=str)
def test_wider_parameters_keep_the_digits(case):
    """A float32 weight beside 16-bit x: the gradients are not rounded to 16 bits on the way."""
    x, dy, weight = case.x(BF16), positive_dy(case, BF16), case.weight(F32)
    stats = case.exact_stats(x)
    got = case.backward(dy, x, *stats, weight)
    want = case.exact_backward(dy, x, *stats, weight)
    for g, name in zip(got[1:], ("dweight", "dbias"), strict=False):
        assert g.dtype == F32
        error = np.abs(g - getattr(want, name)).max()
        assert error <= 2e-6 * getattr(want, name + "_terms")


@pytest.mark.parametrize("case", TALL, ids=str)
def test_dy_of_one_sign(case):
    """float32 with dy near one everywhere: dweight is small beside what its terms add up to in size."""
    x, dy, weight = case.x(), positive_dy(case, F32), case.weight()
    _, mean, rstd = case.forward(x, weight, return_stats=True)
    got = case.backward(dy, x, mean, rstd, weight)
    assert_gradients(got, case.exact_backward(dy, x, mean, rstd, weight))


@pytest.mark.parametrize("case", TALL, ids=str)
def test_far_from_zero(case):
    """dweight of data whose mean is a million standard deviations: dy*(x - mean), never dy*x - mean*dy."""
    x, dy, weight = case.x(mean=1e6, std=1.0), case.dy(), case.weight()
    _, mean, rstd = case.forward(x, weight, return_stats=True)
    got = case.backward(dy, x, mean, rstd, weight)
    assert_gradients(got, case.exact_backward(dy, x, mean, rstd, weight))


def test_a_16_bit_accumulator_would_show():
    """Negative control: the same sum in bfloat16 stalls at 256, far from the check's tolerance."""
    stalled = BF16.type(0)
    for _ in range(1000):
        stalled = BF16.type(stalled + BF16.type(1))
    assert float(stalled) == 256
    with pytest.raises(AssertionError, match="gradient off"):
        assert_gradient(np.array([stalled]), np.array([1000], np.longdouble), 1000.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_65536_rows(dtype):
    rows = 65536
    for shape in ((rows, 64), (rows, 33)):
        case = layer(shape)
        x, dy, weight = case.x(dtype), positive_dy(case, dtype), case.weight(dtype)
        _, mean, rstd = nf.layer_norm(x, weight, return_stats=True)
        _, dweight, dbias = nf.layer_norm_backward(dy, x, mean, rstd, weight)
        xhat = (x.astype(F64) - mean) * rstd.astype(F64)
        with np.errstate(over="ignore"):
            assert (dbias != dy.astype(F64).sum(axis=0).astype(dtype)).sum() <= 1
            assert (dweight != (dy.astype(F64) * xhat).sum(axis=0).astype(dtype)).sum() <= 2
