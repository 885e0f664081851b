"""What is particular to group norm: consecutive channels, groups from 1 to C, channel axes."""

from __future__ import annotations

import numpy as np
import pytest

import normfast as nf
from _cases import group, instance
from _checks import DTYPES, F64, assert_forward, assert_gradients, assert_same_bits, assert_stats


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize(
    ("shape", "channel_axis"), [((2, 12, 5, 3), 1), ((2, 5, 3, 12), -1), ((2, 5, 12, 3), -2), ((3, 12), 1)]
)
def test_groups(shape, channel_axis, num_groups):
    case = group(shape, num_groups, channel_axis=channel_axis)
    for dtype in DTYPES:
        x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
        y, mean, rstd = nf.group_norm(x, num_groups, weight, bias, channel_axis=channel_axis, return_stats=True)
        want = case.exact_forward(x, weight, bias)
        assert mean.shape == rstd.shape == (shape[0], num_groups)
        assert_forward(y, want)
        assert_stats(mean, rstd, want, dtype)
        got = nf.group_norm_backward(dy, x, mean, rstd, weight, channel_axis=channel_axis)
        assert_gradients(got, case.exact_backward(dy, x, mean, rstd, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weight"])
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [*(((2, channels, 3, 7), 1) for channels in (63, 64, 65, 128, 129)), ((2, 390, 2), 3), ((1, 130, 41, 40), 1)],
)
def test_groups_of_many_channels(shape, num_groups, weighted, dtype, threads):
    """The coefficients of 64 channels are computed together; threads share a large group in the middle of one."""
    case = group(shape, num_groups)
    x, dy = case.x(dtype), case.dy(dtype)
    weight, bias = (case.weight(dtype), case.bias(dtype)) if weighted else (None, None)
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
    assert_forward(y, case.exact_forward(x, weight, bias))
    threads(3)
    assert_same_bits(case.forward(x, weight, bias), y)
    assert_gradients(case.backward(dy, x, mean, rstd, weight), case.exact_backward(dy, x, mean, rstd, weight))


def test_groups_are_of_consecutive_channels():
    """Moving one channel moves the results of its own group only."""
    case = group((1, 6, 7), 3)
    x = case.x()
    y = case.forward(x)
    x[0, 3] *= 2
    changed = [not np.array_equal(a, b) for a, b in zip(case.forward(x)[0], y[0], strict=True)]
    assert changed == [False, False, True, True, False, False]


def test_a_group_per_channel_is_instance_norm():
    for shape, axis in [((3, 8, 5), 1), ((3, 5, 8), -1)]:
        one, other = group(shape, 8, channel_axis=axis), instance(shape, channel_axis=axis)
        x, dy, weight, bias = one.x(), one.dy(), one.weight(), one.bias()
        result = one.forward(x, weight, bias, return_stats=True)
        assert_same_bits(result, other.forward(x, weight, bias, return_stats=True))
        _, mean, rstd = result
        assert_same_bits(one.backward(dy, x, mean, rstd, weight), other.backward(dy, x, mean, rstd, weight))


def test_channels_last_is_the_same_operation():
    case = group((2, 12, 5, 7), 4)
    x, weight, bias = case.x(F64), case.weight(F64), case.bias(F64)
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
    last = nf.group_norm(
        np.ascontiguousarray(np.moveaxis(x, 1, -1)), 4, weight, bias, channel_axis=-1, return_stats=True
    )
    np.testing.assert_allclose(np.moveaxis(last[0], -1, 1), y, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(last[1], mean, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(last[2], rstd, rtol=1e-13)


def test_integer_num_groups():
    x = group((2, 6, 5), 3).x()
    assert_same_bits(nf.group_norm(x, np.int64(3)), nf.group_norm(x, num_groups=3))


@pytest.mark.parametrize("ndim", [2, 3, 4, 5, 6])
def test_ranks(ndim):
    for channel_axis in range(1, ndim):
        shape = tuple(6 if a == channel_axis else 2 + a % 3 for a in range(ndim))
        case = group(shape, 3, channel_axis=channel_axis)
        x, dy, weight, bias = case.x(), case.dy(), case.weight(), case.bias()
        assert_forward(case.forward(x, weight, bias), case.exact_forward(x, weight, bias))
        stats = case.exact_stats(x)
        assert_gradients(case.backward(dy, x, *stats, weight), case.exact_backward(dy, x, *stats, weight))
