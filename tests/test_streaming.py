"""Results larger than the cache are written past it, whole cache lines at a time: with the bits of small calls.

Each case is one large call against the same samples a few at a time. Planes and rows are of lengths that end within a
cache line, and one case in two writes to an address that begins within one.
"""

import numpy as np
import pytest

import normfast as nf

CELLS = 1 << 22  # 16 MiB of float32: in and out together more than half of most last-level caches
PLANES = [(7, 7), (14, 14), (5, 5), (3, 5), (33, 31), (4, 4, 4)]


def _arrays(shape, offset, count=1):
    """Random arrays, and an empty one of the same shape that starts `offset` cells into its memory."""
    rng = np.random.default_rng(5)
    made = [rng.standard_normal(shape, dtype=np.float32) + np.float32(3) for _ in range(count)]
    memory = np.empty(made[0].size + 32, np.float32)
    start = -memory.ctypes.data % 64 // 4 + offset
    return *made, memory[start : start + made[0].size].reshape(shape)


def _shape(channels, plane):
    return (CELLS // channels // int(np.prod(plane)), channels, *plane)


def _slices(n):
    """Few samples at a time: calls that stay in the cache."""
    step = max(1, n // 40)
    return [slice(i, i + step) for i in range(0, n, step)]


def _same(large, small):
    np.testing.assert_array_equal(large.view(np.uint32), np.concatenate(small).view(np.uint32))


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("plane", PLANES, ids=str)
def test_batch_norm_in_evaluation(plane, offset):
    x, out = _arrays(_shape(24, plane), offset)
    rng = np.random.default_rng(6)
    mean, weight, bias = rng.standard_normal((3, 24))
    var = rng.random(24) + 0.5
    call = lambda part, **k: nf.batch_norm(part, mean, var, weight, bias, **k)  # noqa: E731
    _same(call(x, out=out), [call(x[s]) for s in _slices(len(x))])


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("plane", PLANES, ids=str)
def test_batch_norm_backward_in_evaluation(plane, offset):
    dy, x, out = _arrays(_shape(24, plane), offset, 2)
    rng = np.random.default_rng(6)
    mean, rstd, weight = rng.standard_normal(24), rng.random(24) + 0.5, rng.standard_normal(24)
    keywords = {"training": False, "needs": ("x",)}
    large = nf.batch_norm_backward(dy, x, mean, rstd, weight, out=out, **keywords)[0]
    small = [nf.batch_norm_backward(dy[s], x[s], mean, rstd, weight, **keywords)[0] for s in _slices(len(x))]
    _same(large, small)


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("groups", [4, 24])
def test_group_norm(plane, groups, offset):
    dy, x, out = _arrays(_shape(24, plane), offset, 2)
    weight, bias = np.random.default_rng(6).standard_normal((2, 24))
    large, mean, rstd = nf.group_norm(x, groups, weight, bias, return_stats=True, out=out)
    _same(large, [nf.group_norm(x[s], groups, weight, bias) for s in _slices(len(x))])
    large = nf.group_norm_backward(dy, x, mean, rstd, weight, needs=("x",), out=out)[0]
    small = [nf.group_norm_backward(dy[s], x[s], mean[s], rstd[s], weight, needs=("x",))[0] for s in _slices(len(x))]
    _same(large, small)


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("n", [12, 16, 64, 100, 768, 1000])
def test_layer_norm(n, offset):
    dy, x, out = _arrays((CELLS // n, n), offset, 2)
    weight, bias = np.random.default_rng(6).standard_normal((2, n))
    large, mean, rstd = nf.layer_norm(x, weight, bias, return_stats=True, out=out)
    _same(large, [nf.layer_norm(x[s], weight, bias) for s in _slices(len(x))])
    for needs in (("x",), ("x", "weight", "bias")):
        large = nf.layer_norm_backward(dy, x, mean, rstd, weight, needs=needs, out=out)[0]
        small = [nf.layer_norm_backward(dy[s], x[s], mean[s], rstd[s], weight, needs=needs)[0] for s in _slices(len(x))]
        _same(large, small)
