"""The example of the course notes, three images of four channels of 2x2, with its published moments."""

from __future__ import annotations

import numpy as np
import pytest

import normfast as nf
from _checks import F32, F64

IMAGES = np.array(
    [
        [[0, -2, 3, 0], [1, 0, 3, 0], [3, -1, 2, 2], [3, 1, 0, 1]],
        [[1, 2, 2, 2], [0, 0, -1, 0], [2, 1, -3, -1], [1, 3, -3, -1]],
        [[1, 1, -3, -3], [-1, -3, -1, 1], [-2, 1, 0, 0], [-3, -2, 0, -1]],
    ]
).reshape(3, 4, 2, 2)

# Printed digits of each: half a unit of the last one is the most that a correct value can be off.
BATCH = {"mean": ([0.333, -0.083, 0.333, -0.083], 5e-4), "var": ([3.722, 1.91, 3.056, 3.743], 5e-4)}
LAYER = {"mean": ([1, 0.3125, -0.9375], 1e-6), "var": ([2.25, 2.965, 2.309], 5e-4)}
GROUP = {
    "mean": ([[0.625, 1.375], [0.75, -0.125], [-1, -0.875]], 1e-6),
    "var": ([[2.484375, 1.734375], [1.1875, 4.359375], [3, 1.609375]], 1e-6),
}


def check(result, published):
    _, mean, rstd = result
    value, slack = published["mean"]
    np.testing.assert_allclose(mean.reshape(np.shape(value)), value, atol=slack, rtol=0)
    value, slack = published["var"]
    np.testing.assert_allclose(1 / rstd.astype(F64).reshape(np.shape(value)) ** 2, value, atol=slack, rtol=0)


@pytest.mark.parametrize("dtype", [np.int64, F32, F64])
def test_published_moments(dtype):
    x = IMAGES.astype(dtype)
    check(nf.batch_norm(x, training=True, eps=0, return_stats=True), BATCH)
    check(nf.layer_norm(x, axis=(1, 2, 3), eps=0, return_stats=True), LAYER)
    check(nf.group_norm(x, 2, eps=0, return_stats=True), GROUP)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_channels_last(dtype):
    x = np.ascontiguousarray(np.moveaxis(IMAGES.astype(dtype), 1, -1))
    check(nf.batch_norm(x, training=True, eps=0, channel_axis=-1, return_stats=True), BATCH)
    check(nf.layer_norm(x, axis=(1, 2, 3), eps=0, return_stats=True), LAYER)
    check(nf.group_norm(x, 2, eps=0, channel_axis=-1, return_stats=True), GROUP)


def test_normalized_values():
    """The first image by hand: mean 1, variance 2.25, so y = (x - 1) / 1.5."""
    x = IMAGES.astype(F64)
    y = nf.layer_norm(x, axis=(1, 2, 3), eps=0)
    np.testing.assert_allclose(y[0], (x[0] - 1) / 1.5, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.int64, F32, F64])
def test_z_score(dtype):
    y = nf.layer_norm(np.array([4, 6213, 347], dtype), eps=0)
    # The notes print four digits of it, the last one cut off rather than rounded.
    np.testing.assert_allclose(y, [-0.7664, 1.4125, -0.6460], atol=1e-4, rtol=0)
    np.testing.assert_allclose(y, np.array([-2184, 4025, -1841]) / np.sqrt(24359762 / 3), rtol=3e-7)
