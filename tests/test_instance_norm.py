"""What is particular to instance norm: one statistic per sample and channel, planes of any size."""

from __future__ import annotations

import numpy as np
import pytest

import normfast as nf
from _cases import instance
from _checks import DTYPES, F32, F64, assert_forward, assert_gradients, assert_same_bits, assert_stats


@pytest.mark.parametrize("plane", [(1,), (2,), (3, 3), (7, 7), (14, 14), (5, 3, 4), (28, 29)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes(dtype, plane):
    for shape, axis in [((3, 5, *plane), 1), ((3, *plane, 5), -1)]:
        case = instance(shape, channel_axis=axis)
        x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
        y, mean, rstd = nf.instance_norm(x, weight, bias, channel_axis=axis, return_stats=True)
        want = case.exact_forward(x, weight, bias)
        assert mean.shape == rstd.shape == (3, 5)
        assert_forward(y, want)
        assert_stats(mean, rstd, want, dtype)
        got = nf.instance_norm_backward(dy, x, mean, rstd, weight, channel_axis=axis)
        assert_gradients(got, case.exact_backward(dy, x, mean, rstd, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_two(dtype):
    """No other axes: a plane of one cell is constant, so the result is the bias."""
    case = instance((4, 7))
    x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
    y, mean, rstd = nf.instance_norm(x, weight, bias, return_stats=True)
    assert_same_bits(y, np.broadcast_to(bias, y.shape))
    assert_same_bits(mean, x.astype(mean.dtype))
    np.testing.assert_allclose(rstd, 1 / np.sqrt(1e-5), rtol=1e-6)


def test_every_plane_is_normalized():
    x = instance((3, 5, 41)).x()
    y = nf.instance_norm(x, eps=0).astype(F64)
    np.testing.assert_allclose(y.mean(axis=2), 0, atol=1e-6)
    np.testing.assert_allclose(y.var(axis=2), 1, rtol=1e-6)


def test_one_sample_equals_batch_norm():
    x = instance((1, 5, 41)).x(F64)
    a = nf.instance_norm(x, return_stats=True)
    b = nf.batch_norm(x, training=True, return_stats=True)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(a[1][0], b[1], rtol=1e-13)


def test_spatial_memory_order_does_not_matter_to_the_values():
    """Heights and widths exchanged in memory: the same planes, so the same numbers to rounding."""
    x = instance((2, 3, 5, 7)).x(F32)
    swapped = np.ascontiguousarray(x.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    np.testing.assert_allclose(nf.instance_norm(swapped), nf.instance_norm(x), rtol=1e-5, atol=1e-6)
