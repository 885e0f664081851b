"""Forward of every norm: layout x dtype x weight and bias x statistics, against the exact result (promise 2)."""

from __future__ import annotations

import numpy as np
import pytest

from _cases import LAYOUTS, batch, group, instance, layer, rms
from _checks import DTYPES, F32, F64, NARROW, assert_forward, assert_same_bits, assert_stats, stat_dtype

PARAMETERS = ["none", "weight", "bias", "both"]
SIZES = [1, 2, 3, 7, 13, 15, 16, 17, 31, 63, 64, 65, 127, 251, 257, 1023, 1024, 1025]


def parameters(case, which, dtype):
    weight = case.weight(dtype) if which in ("weight", "both") else None
    bias = case.bias(dtype) if which in ("bias", "both") else None
    return weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case, dtype):
    x = case.x(dtype)
    for which in PARAMETERS:
        weight, bias = parameters(case, which, dtype)
        y = case.forward(x, weight, bias)
        assert isinstance(y, np.ndarray)
        assert y.dtype == dtype
        assert_forward(y, case.exact_forward(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_statistics(case, dtype):
    """Shapes, dtypes and values of mean and rstd; asking for them does not change y."""
    x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
    assert_same_bits(y, case.forward(x, weight, bias))
    assert (mean is not None) == case.has_mean
    assert_stats(mean, rstd, case.exact_forward(x), dtype)


@pytest.mark.parametrize("param_dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_parameter_dtypes(case, dtype, param_dtype):
    """float32 and float64 parameters go with every x, and neither decides the dtype of the result."""
    x = case.x(dtype)
    weight, bias = case.weight(param_dtype), case.bias(param_dtype)
    y = case.forward(x, weight, bias)
    assert y.dtype == dtype
    assert_forward(y, case.exact_forward(x, weight, bias))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", [layer((37, 67)), batch((6, 11, 35)), group((3, 12, 35), 4)], ids=str)
def test_mixed_parameter_dtypes(case, dtype):
    """weight and bias need not have the same dtype."""
    x = case.x(dtype)
    for weight_dtype, bias_dtype in [(dtype, F32), (F64, dtype), (F32, F64)]:
        weight, bias = case.weight(weight_dtype), case.bias(bias_dtype)
        assert_forward(case.forward(x, weight, bias), case.exact_forward(x, weight, bias))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_widths(dtype, size):
    for case in (layer((3, size)), rms((3, size)), layer((size, 3), axis=0), rms((2, size, 3), axis=1)):
        x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
        assert_forward(case.forward(x, weight, bias), case.exact_forward(x, weight, bias))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spatial_sizes(dtype, size):
    """Planes of every size, channels first and last."""
    for case in (
        group((2, 6, size), 3),
        group((2, size, 6), 3, channel_axis=-1),
        instance((2, 3, size)),
        instance((2, size, 3), channel_axis=-1),
        batch((3, 5, size)),
        batch((3, size, 5), channel_axis=-1),
    ):
        x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
        y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
        want = case.exact_forward(x, weight, bias)
        assert_forward(y, want)
        assert_stats(mean, rstd, want, dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channel_counts(dtype, size):
    for case in (
        instance((2, size, 5)),
        instance((2, 5, size), channel_axis=-1),
        batch((3, size, 5)),
        batch((3, 5, size), channel_axis=-1),
        batch((5, size)),
        batch((5, size), training=False),
        group((2, 2 * size, 5), 2),
        group((2, 5, 2 * size), 2, channel_axis=-1),
    ):
        x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
        assert_forward(case.forward(x, weight, bias), case.exact_forward(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        layer((2, 4099)),
        layer((2, 100_003)),
        rms((2, 100_003)),
        layer((4099, 3), axis=0),
        layer((50_021, 2), axis=0),
        group((1, 4, 25_013), 2),
        instance((1, 2, 50_021)),
        instance((1, 50_021, 2), channel_axis=-1),
        batch((3, 2, 30_011)),
        batch((50_021, 3)),
        batch((2, 50_021)),
    ],
    ids=str,
)
def test_wide(case, dtype):
    x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
    want = case.exact_forward(x, weight, bias)
    assert_forward(y, want)
    assert_stats(mean, rstd, want, dtype)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1e-3, 0.5, 10, np.float32(1e-5)])
@pytest.mark.parametrize(
    "case", [layer((5, 33)), rms((5, 33)), group((2, 6, 7), 2), instance((2, 3, 9)), batch((9, 5))]
)
def test_eps(case, eps):
    for dtype in (F32, F64):
        x = case.x(dtype)
        y, mean, rstd = case.forward(x, eps=eps, return_stats=True)
        want = case.exact_forward(x, eps=eps)
        assert_forward(y, want)
        assert_stats(mean, rstd, want, dtype)


@pytest.mark.parametrize(
    "case", [layer((5, 33)), rms((5, 33)), group((2, 6, 7), 2), instance((2, 3, 9)), batch((9, 5))]
)
def test_default_eps(case):
    """The documented defaults: 1e-5, for RMS norm 1e-6; data small enough for them to count."""
    x = case.x(F64, mean=0.0, std=1e-3)
    assert_same_bits(case.forward(x), case.forward(x, eps=case.eps))
    assert not np.allclose(case.forward(x), case.forward(x, eps=case.eps * 2), rtol=1e-6)


def test_the_comparison_notices_errors():
    """Negative control: a result one float32 ulp of the row's largest value too far off must be refused."""
    case = layer((3, 67))
    x = case.x(F32)
    want = case.exact_forward(x)
    y = case.forward(x)
    assert_forward(y, want)
    step = np.spacing(np.abs(y).max(axis=1)[0])
    wrong = y.copy()
    wrong[0, 5] = np.float32(want.y[0, 5]) + 4 * step
    with pytest.raises(AssertionError, match="ulp"):
        assert_forward(wrong, want)
    half = case.forward(x.astype(np.float16))
    want = case.exact_forward(x.astype(np.float16))
    assert_forward(half, want)
    with pytest.raises(AssertionError, match="ulp"):
        assert_forward(np.nextafter(half, np.float16(np.inf)), want)
    assert stat_dtype(half.dtype) == F32
