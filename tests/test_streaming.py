"""Results larger than the cache are written past it, whole cache lines at a time: with the bits of small calls.

Each case is one large call against the same samples a few at a time. Planes and rows are of lengths that end within a
cache line, and one case in two writes to an address that begins within one.
"""

import numpy as np
import pytest

import normfast as nf

CELLS = 1 << 22  # 16 MiB of float32: in and out together more than half of most last-level caches
PLANES = [(7, 7), (14, 14), (5, 5), (3, 5), (33, 31), (4, 4, 4)]


def _arrays(shape, offset, count=1, dtype=np.float32):
    """Random arrays, and one of the same shape whose first cell is number `offset` of a cache line."""
    rng = np.random.default_rng(5)
    made = [(rng.standard_normal(shape, dtype=np.float32) + np.float32(3)).astype(dtype) for _ in range(count)]
    size, line = made[0].size, 64 // made[0].itemsize
    memory = np.full(size + 2 * line, 77, dtype)
    start = -memory.ctypes.data % 64 // made[0].itemsize + offset
    return *made, memory[start : start + size].reshape(shape)


def _nothing_written_beside(out):
    memory = out.base
    start = (out.ctypes.data - memory.ctypes.data) // memory.itemsize
    np.testing.assert_array_equal(memory[:start], np.full(start, 77, memory.dtype))
    np.testing.assert_array_equal(memory[start + out.size :], np.full(memory.size - start - out.size, 77, memory.dtype))


def _shape(channels, plane):
    return (CELLS // channels // int(np.prod(plane)), channels, *plane)


def _slices(n):
    """Few samples at a time: calls that stay in the cache."""
    step = max(1, n // 40)
    return [slice(i, i + step) for i in range(0, n, step)]


def _same(large, small):
    bits = f"u{large.itemsize}"
    np.testing.assert_array_equal(large.view(bits), np.concatenate(small).view(bits))
    _nothing_written_beside(large)


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
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("n", [12, 16, 17, 30, 64, 100, 200, 768, 1000, 1030])
def test_layer_norm(n, extreme, offset):
    dy, x, out = _arrays((CELLS // n, n), offset, 2)
    if extreme:  # rows that go another way than those they share cache lines with
        x[3::7] *= np.float32(1e30)
    weight, bias = np.random.default_rng(6).standard_normal((2, n))
    large, mean, rstd = nf.layer_norm(x, weight, bias, return_stats=True, out=out)
    _same(large, [nf.layer_norm(x[s], weight, bias) for s in _slices(len(x))])
    for needs in (("x",), ("x", "weight", "bias")):
        large = nf.layer_norm_backward(dy, x, mean, rstd, weight, needs=needs, out=out)[0]
        small = [nf.layer_norm_backward(dy[s], x[s], mean[s], rstd[s], weight, needs=needs)[0] for s in _slices(len(x))]
        _same(large, small)


# A line of two rows is written when the second is done: nothing that it holds may be needed after that.
@pytest.mark.parametrize("n", [17, 30, 100, 150, 250, 1000])
def test_layer_norm_in_place(n):
    dy, x, memory = _arrays((CELLS // n, n), 5, 2)
    weight = np.random.default_rng(6).standard_normal(n)
    want, mean, rstd = nf.layer_norm(x, weight, return_stats=True)
    memory[...] = x
    nf.layer_norm(memory, weight, out=memory)
    _same(memory, [want])
    for needs in (("x",), ("x", "weight", "bias")):
        want = nf.layer_norm_backward(dy, x, mean, rstd, weight, needs=needs)[0]
        memory[...] = dy
        nf.layer_norm_backward(memory, x, mean, rstd, weight, needs=needs, out=memory)
        _same(memory, [want])


def _other(dtype, offset):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    return dtype, offset % (64 // dtype.itemsize)


# A vector of float16 is half a cache line, one of float64 a whole one: what lies before the first whole line, up to 31
# cells, and behind the last is stored, everything else streamed.
@pytest.mark.parametrize("offset", [0, 1, 8, 24, 31])
@pytest.mark.parametrize(("dtype", "n"), [("float16", 250), ("float16", 31), ("float64", 100), ("bfloat16", 1056)])
def test_other_cells(dtype, n, offset):
    dtype, offset = _other(dtype, offset)
    x, out = _arrays((4 * CELLS // dtype.itemsize // n, n), offset, dtype=dtype)
    weight, bias = np.random.default_rng(6).standard_normal((2, n)).astype(np.float32)
    _same(nf.layer_norm(x, weight, bias, out=out), [nf.layer_norm(x[s], weight, bias) for s in _slices(len(x))])
    x, out = x[: len(x) // 6 * 6].reshape(-1, 6, n), out[: len(x) // 6 * 6].reshape(-1, 6, n)
    out.base[...] = 77
    _same(nf.instance_norm(x, out=out), [nf.instance_norm(x[s]) for s in _slices(len(x))])


# Down the rows, dx is written as it lies in memory, and the gradients of the parameters keep their columns: of short
# rows, of strips of long ones, of strips that two threads share, and of a single group of rows.
@pytest.mark.parametrize("offset", [1, 8, 24, 31])
@pytest.mark.parametrize(("dtype", "n"), [("float32", 64), ("float32", 1024), ("float16", 160), ("bfloat16", 8224),
                                          ("float64", 104), ("float64", 1000), ("float32", 1 << 20)])  # fmt: skip
def test_parameter_gradients(dtype, n, offset):
    dtype, offset = _other(dtype, offset)
    dy, x, out = _arrays((4 * CELLS // dtype.itemsize // n, n), offset, 2, dtype)
    weight = np.random.default_rng(6).standard_normal(n).astype(np.float32)
    mean, rstd = nf.layer_norm(x, weight, return_stats=True)[1:]
    want = nf.layer_norm_backward(dy, x, mean, rstd, weight)
    dx, *gradients = nf.layer_norm_backward(dy, x, mean, rstd, weight, out=out)
    _same(dx, [want[0]])
    for one, other in zip(gradients, want[1:], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("dtype", "width"), [(np.float32, 256), (np.float32, 300), (np.float64, 192)], ids=str)
def test_batch_norm_backward_reads_rows_in_order(dtype, width):
    """Arrays of which the last-level cache holds little are summed row by row: the bits of calls with fewer columns."""
    rows = 13 * CELLS // width // np.dtype(dtype).itemsize  # 54 MB
    x, dy, out = _arrays((rows, width), 0, 2, dtype)
    rng = np.random.default_rng(8)
    mean, rstd, weight = rng.random((3, width)).astype(dtype) + dtype(0.5)
    whole = nf.batch_norm_backward(dy, x, mean, rstd, weight, channel_axis=-1, out=out)
    half = max(128, width // 2)
    for c in (slice(0, half), slice(width - half, width)):
        part = [np.ascontiguousarray(a[..., c]) for a in (dy, x, mean, rstd, weight)]
        for a, b in zip(whole, nf.batch_norm_backward(*part, channel_axis=-1), strict=True):
            np.testing.assert_array_equal(a[..., c], b)
