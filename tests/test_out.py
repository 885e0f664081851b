"""`out`: any strides, x or dy themselves, refused where it would overlap otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import normfast as nf
from _cases import LAYOUTS, batch, data, group, instance, layer, rms
from _checks import BF16, DTYPES, F32, F64, assert_same_bits

CASES = [
    layer((6, 33)),
    layer((3, 5, 8), axis=1),
    rms((6, 33)),
    rms((3, 5, 8), axis=(0, 2)),
    group((3, 6, 10), 2),
    group((3, 10, 6), 2, channel_axis=-1),
    instance((3, 4, 10)),
    batch((6, 4, 10)),
    batch((6, 10, 4), channel_axis=-1),
    batch((6, 4, 10), training=False),
]


def rooms(shape, dtype):
    """Places for a result: contiguous, permuted, strided, reversed, misaligned to a vector and to a cell."""
    yield np.full(shape, 99, dtype)
    yield np.full(shape[::-1], 99, dtype).T
    yield np.full((shape[0] * 2, *shape[1:-1], shape[-1] * 3), 99, dtype)[::2, ..., 1::3]
    yield np.full(shape, 99, dtype)[(slice(None, None, -1),) * len(shape)]
    size = int(np.prod(shape))
    yield np.full(size + 1, 99, dtype)[1:].reshape(shape)
    yield np.frombuffer(bytearray(1 + size * np.dtype(dtype).itemsize), dtype, offset=1).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype):
    """out itself comes back, with the bits of a fresh result, and no cell around it is touched."""
    x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
    want = case.forward(x, weight, bias, return_stats=True)
    for out in rooms(case.shape, dtype):
        room = out
        while isinstance(room.base, np.ndarray):
            room = room.base
        outside = np.ones(room.shape, bool)
        if room.dtype == out.dtype and room.size > out.size:
            marks = np.zeros(out.shape, dtype)
            out[...] = marks
            outside = room == 99
        result = case.forward(x, weight, bias, out=out, return_stats=True)
        assert result[0] is out
        assert_same_bits(result, want)
        if not outside.all():
            assert (room[outside] == 99).all()
        assert case.forward(x, weight, bias, out=out) is out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, dtype):
    x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(dtype)
    stats = case.exact_stats(x)
    want = case.backward(dy, x, *stats, weight)
    for out in rooms(case.shape, dtype):
        got = case.backward(dy, x, *stats, weight, out=out)
        assert got[0] is out
        assert_same_bits(got, want)
        assert case.backward(dy, x, *stats, weight, out=out, needs=("x",))[0] is out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LAYOUTS[8:10]], ids=str)
def test_in_place(case, dtype):
    """out is x forward, and x or dy backward: the same bits as with fresh memory."""
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    want = case.forward(x, weight, bias, return_stats=True)
    same = x.copy(order="K")
    result = case.forward(same, weight, bias, out=same, return_stats=True)
    assert result[0] is same
    assert_same_bits(result, want)

    stats = case.exact_stats(x)
    want = case.backward(dy, x, *stats, weight)
    same = x.copy(order="K")
    got = case.backward(dy, same, *stats, weight, out=same)
    assert got[0] is same
    assert_same_bits(got, want)
    same = dy.copy(order="K")
    got = case.backward(same, x, *stats, weight, out=same)
    assert got[0] is same
    assert_same_bits(got, want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_place_through_another_view(case):
    """The same memory, shape and strides is what counts, not the same object; strided views included."""
    for dtype in (F32, BF16):
        x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
        want = case.forward(x, weight, bias)
        room = np.zeros((*case.shape[:-1], case.shape[-1] * 2), dtype)
        view = room[..., ::2]
        view[...] = x
        out = room[..., ::2]
        assert case.forward(view, weight, bias, out=out) is out
        assert_same_bits(out, want)
        assert not room[..., 1::2].astype(F64).any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_x_as_dy(case):
    """One array in both roles, and as out besides."""
    x = case.x()
    stats = case.exact_stats(x)
    want = case.backward(x.copy(), x.copy(), *stats)[0]
    assert_same_bits(case.backward(x, x, *stats)[0], want)
    assert_same_bits(case.backward(x, x, *stats, out=x)[0], want)


def overlapping(shape):
    """Pairs (x, out) that share memory without being the same array."""
    size = int(np.prod(shape))
    room = data((size + 5,))
    yield room[:size].reshape(shape), room[5:].reshape(shape)
    yield room[1 : 1 + size].reshape(shape), room[:size].reshape(shape)
    square = data(shape)
    yield square, square[::-1]
    yield square, square[..., ::-1]
    twice = data((2 * shape[0], *shape[1:]))
    yield twice[: shape[0]], twice[1 : shape[0] + 1][::-1]  # begins where x ends, and goes back into it
    both = data((*shape[:-1], shape[-1] * 2))
    yield both[..., : shape[-1]], both[..., 1 : 1 + shape[-1]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_overlap_is_refused(case):
    for x, out in overlapping(case.shape):
        before = x.copy(), out.copy()
        with pytest.raises(ValueError, match=rf"^{case.op}: out must .*got"):
            case.forward(x, out=out)
        stats = case.exact_stats(x)
        with pytest.raises(ValueError, match=rf"^{case.op}_backward: out must .*got"):
            case.backward(case.dy(), x, *stats, out=out)
        with pytest.raises(ValueError, match=rf"^{case.op}_backward: out must .*got"):
            case.backward(x, case.x(), *stats, out=out)
        assert_same_bits((x, out), before)


def test_what_is_too_hard_to_tell_is_refused():
    """Whether these two share a cell is a knapsack problem that NumPy gives up: the cautious answer is yes."""
    room, shape = np.zeros(1 << 22, F32), (12, 12, 12, 12)
    x = as_strided(room, shape, (26024, 308977, 330369, 184788))
    out = as_strided(room[209_785:], shape, (34336, 2856, 224, 4))
    with pytest.raises(np.exceptions.TooHardError):
        np.shares_memory(out, x, 100_000)
    with pytest.raises(ValueError, match=r"^layer_norm: out must be x itself or not overlap it"):
        nf.layer_norm(x, out=out)


def test_the_memory_of_x_as_another_dtype_is_refused():
    """x of integers is computed in float64: out in its place would be read as it is written."""
    x = np.arange(35).reshape(5, 7) ** 2
    with pytest.raises(ValueError, match=r"^layer_norm: out must be x itself or not overlap it"):
        nf.layer_norm(x, out=x.view(F64))
    assert_same_bits(x, np.arange(35).reshape(5, 7) ** 2)


def test_no_stride_matters_along_an_axis_of_one_or_no_cells():
    """NumPy gives an axis that it inserts a stride of 0: that is no overlap of out with itself."""
    x, out = data((1, 33)), np.empty(33, F32)[np.newaxis]
    assert nf.layer_norm(x, out=out) is out
    assert_same_bits(out, nf.layer_norm(x))
    empty = as_strided(np.zeros(1, F32), (0, 8), (0, 0))
    assert nf.layer_norm(np.zeros((0, 8), F32), out=empty) is empty


def test_transposed_overlap_is_refused():
    x = data((7, 7))
    before = x.copy()
    with pytest.raises(ValueError, match=r"^layer_norm: out must"):
        nf.layer_norm(x, out=x.T)
    assert_same_bits(x, before)


def test_interleaved_views_do_not_overlap():
    """Sharing a buffer is no overlap where no cell is shared."""
    room = data((6, 34))
    x, out = room[:, ::2], room[:, 1::2]
    want = nf.layer_norm(x.copy())
    assert nf.layer_norm(x, out=out) is out
    assert_same_bits(out, want)
    halves = data((2, 6, 17))
    want = nf.layer_norm(halves[0])
    assert_same_bits(nf.layer_norm(halves[0], out=halves[1]), want)


def test_overlap_with_other_arguments_is_refused():
    """out may share memory with neither the parameters nor the statistics."""
    x, out = data((6, 8)), data((6, 8))
    for arguments in ({"weight": out[0]}, {"bias": out[3]}, {"weight": out[:1, :].reshape(8)}):
        with pytest.raises(ValueError, match=r"^layer_norm: out must"):
            nf.layer_norm(x, out=out, **arguments)
    with pytest.raises(ValueError, match=r"^rms_norm: out must"):
        nf.rms_norm(x, out[1], out=out)
    with pytest.raises(ValueError, match=r"^batch_norm: out must"):
        nf.batch_norm(x, out[0], np.ones(8, F32), out=out)
    with pytest.raises(ValueError, match=r"^batch_norm: out must"):
        nf.batch_norm(x, np.zeros(8, F32), np.abs(out[0]), out[1], out=out)
    mean, rstd = layer((6, 8)).exact_stats(x, dtype=F32)
    room = np.concatenate([mean, rstd, x], axis=1).reshape(-1)
    place, mean = room[:48].reshape(6, 8), room[2:8].reshape(6, 1)
    with pytest.raises(ValueError, match=r"^layer_norm_backward: out must"):
        nf.layer_norm_backward(x, x.copy(), mean, rstd, out=place)


def test_subclass_and_memory_map(tmp_path):
    """An array is an array, of whatever subclass."""
    x = data((6, 33))
    out = np.memmap(tmp_path / "y", F32, "w+", shape=(6, 33))
    assert nf.layer_norm(x, out=out) is out
    assert_same_bits(np.asarray(out), nf.layer_norm(x))


def test_out_for_integers_is_float64():
    x = np.arange(35).reshape(5, 7) ** 2
    out = np.empty((5, 7), F64)
    assert nf.layer_norm(x, out=out) is out
    with pytest.raises(TypeError, match=r"^layer_norm: out must .*float64.*got int64"):
        nf.layer_norm(x, out=x)


def test_out_does_not_keep_memory():
    """The array returned is out: no hidden reference remains after the call."""
    import sys

    x, out = data((6, 33)), np.empty((6, 33), F32)
    count = sys.getrefcount(out)
    for _ in range(10):
        nf.layer_norm(x, out=out)
    assert sys.getrefcount(out) == count
