"""What is particular to RMS norm: no mean, no bias, an eps of its own."""

from __future__ import annotations

import numpy as np
import pytest

import normfast as nf
from _cases import rms
from _checks import DTYPES, F32, F64, assert_forward, assert_gradients, assert_same_bits, stat_dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_results(dtype):
    case = rms((5, 33))
    x = case.x(dtype)
    result = nf.rms_norm(x, return_stats=True)
    assert isinstance(result, tuple)
    assert len(result) == 2
    assert result[1].shape == (5, 1)
    assert result[1].dtype == stat_dtype(dtype)
    assert len(nf.rms_norm_backward(case.dy(dtype), x, result[1])) == 2


def test_mean_is_kept():
    """Constant rows become plus or minus the weight, whatever their size."""
    for value in (1e-30, 0.3, -7.7, 1e30):
        x = np.full((3, 67), value, F32)
        np.testing.assert_allclose(nf.rms_norm(x, eps=0), np.sign(x), rtol=3e-7)


def test_zero_rows_stay_zero():
    weight = rms((3, 67)).weight()
    for dtype in DTYPES:
        x = np.zeros((3, 67), dtype)
        for eps in (0, 1e-6):
            y = nf.rms_norm(x, weight, eps=eps)
            assert y.dtype == dtype
            assert not y.astype(F64).any()


@pytest.mark.parametrize("offset", [0, 10, 1e3, 1e6])
def test_offsets(offset):
    case = rms((9, 257))
    x, dy, weight = case.x(mean=offset), case.dy(), case.weight()
    y, _, rstd = case.forward(x, weight, return_stats=True)
    assert_forward(y, case.exact_forward(x, weight))
    assert_gradients(case.backward(dy, x, None, rstd, weight), case.exact_backward(dy, x, None, rstd, weight))


def test_equals_layer_norm_of_centred_data():
    """Where the mean is zero the two differ by rounding only."""
    x = rms((9, 64)).x(F64)
    x = np.concatenate([x, -x], axis=1)
    np.testing.assert_allclose(nf.rms_norm(x, eps=1e-5), nf.layer_norm(x, eps=1e-5), rtol=1e-13, atol=1e-13)


def test_axes():
    for axis in (0, 1, (0, 2), (-1, 0), (0, 1, 2)):
        case = rms((5, 7, 9), axis=axis)
        x, weight = case.x(), case.weight()
        y, rstd = nf.rms_norm(x, weight, axis=axis, return_stats=True)
        assert rstd.shape == case.stat_shape
        assert_forward(y, case.exact_forward(x, weight))


def test_bias_is_no_argument():
    x = rms((5, 7)).x()
    with pytest.raises(TypeError):
        nf.rms_norm(x, None, bias=np.zeros(7, F32))
    with pytest.raises(TypeError):
        nf.rms_norm(x, None, np.zeros(7, F32))


def test_weight_scales():
    """A power of two in the weight comes through exactly."""
    x = rms((5, 33)).x()
    assert_same_bits(nf.rms_norm(x, np.full(33, 4, F32)), nf.rms_norm(x) * F32.type(4))
