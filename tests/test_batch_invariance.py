"""Promise 1: one reduction's results do not depend on the others, on how many there are, or on its place among them."""

from __future__ import annotations

import numpy as np
import pytest

from _cases import batch, group, instance, layer, rms
from _checks import BF16, DTYPES, F16, F32, F64, assert_same_bits, nudged, same_bits

# Cases whose first axis counts reductions (or samples with all of theirs); batch norm makes no such promise.
SAMPLES = [
    layer((37, 67)),
    layer((37, 1031)),
    layer((37, 3)),
    layer((37, 5, 33), axis=(1, 2)),
    layer((37, 19, 6, 7), axis=1),
    layer((37, 19, 6, 7), axis=(1, 3)),
    layer((37, 19, 6, 7), axis=2),
    layer((37, 19, 33), axis=1, permutation=(0, 2, 1)),
    rms((37, 67)),
    rms((37, 1031)),
    rms((37, 19, 6, 7), axis=1),
    group((37, 12, 5, 7), 4),
    group((37, 12, 1, 1), 4),
    group((37, 5, 7, 12), 4, channel_axis=-1),
    group((37, 5, 12, 7), 3, channel_axis=2),
    instance((37, 5, 6, 11)),
    instance((37, 6, 11, 5), channel_axis=-1),
    instance((37, 3, 3, 17), channel_axis=-1),
]


def run(case, x, dy, weight, bias):
    """What belongs to one reduction: y, its statistics, dx."""
    case = case.with_(shape=x.shape)
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
    return y, mean, rstd, case.backward(dy, x, mean, rstd, weight)[0]


def pick(results, index):
    return tuple(None if r is None else r[index] for r in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_alone_and_among_others(case, dtype):
    """Every sample of a batch has the bits that it has alone; also in batches of 2, 15, 16, 17."""
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    want = run(case, x, dy, weight, bias)
    count = case.shape[0]
    for i in range(count):
        one = slice(i, i + 1)
        assert_same_bits(run(case, x[one], dy[one], weight, bias), pick(want, one))
    for size in (2, 3, 15, 16, 17, 31):
        for start in (0, 1, count - size):
            some = slice(start, start + size)
            assert_same_bits(run(case, x[some], dy[some], weight, bias), pick(want, some))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_every_position(case, dtype):
    """The same sample 33 times: the same bits at every position, so in every lane and block."""
    for source in (0, 5):
        arrays = [np.repeat(a[source : source + 1], 33, axis=0) for a in (case.x(dtype), case.dy(dtype))]
        results = run(case, *arrays, case.weight(dtype), case.bias(dtype))
        for i in range(1, 33):
            assert_same_bits(pick(results, slice(i, i + 1)), pick(results, slice(0, 1)))


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("neighbour", [0.0, 1e30, np.nan, np.inf])
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_neighbours_do_not_matter(case, dtype, neighbour):
    """The other samples replaced by something else entirely."""
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    kept = [0, 7, 16, 36]
    want = pick(run(case, x, dy, weight, bias), kept)
    others = np.setdiff1d(np.arange(case.shape[0]), kept)
    x[others] = neighbour
    assert_same_bits(pick(run(case, x, dy, weight, bias), kept), want)


COLUMNS = [layer((67, 37), axis=0), layer((5, 19, 37), axis=(0, 1)), rms((67, 37), axis=0), layer((1031, 37), axis=0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", COLUMNS, ids=str)
def test_columns(case, dtype):
    """Reductions that lie side by side: one column alone, at every place among the sixteen of a vector."""
    x, dy = case.x(dtype), case.dy(dtype)
    weight, bias = case.weight(dtype), case.bias(dtype)
    want = run(case, x, dy, weight, bias)
    for i in range(case.shape[-1]):
        one = slice(i, i + 1)
        alone = [np.ascontiguousarray(a[..., one]) for a in (x, dy)]
        assert_same_bits(run(case, *alone, weight, bias), tuple(None if r is None else r[..., one] for r in want))
    for width in (2, 7, 15, 16, 17, 33):
        some = [np.ascontiguousarray(a[..., -width:]) for a in (x, dy)]
        assert_same_bits(run(case, *some, weight, bias), tuple(None if r is None else r[..., -width:] for r in want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instances_side_by_side(dtype):
    """Channels-last instance norm: a channel alone has the bits that it has among 37."""
    case = instance((3, 61, 37), channel_axis=-1)
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    y, mean, rstd, dx = run(case, x, dy, weight, bias)
    for i in range(37):
        one = slice(i, i + 1)
        got = run(case, *(np.ascontiguousarray(a[..., one]) for a in (x, dy)), weight[one], bias[one])
        assert_same_bits(got, (y[..., one], mean[:, one], rstd[:, one], dx[..., one]))


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_side_by_side(dtype, channel_axis):
    """A group alone has the bits that it has among twelve."""
    shape = (3, 36, 31) if channel_axis == 1 else (3, 31, 36)
    case = group(shape, 12, channel_axis=channel_axis)
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    y, mean, rstd, dx = run(case, x, dy, weight, bias)
    for g in range(12):
        own = slice(3 * g, 3 * g + 3)
        at = (slice(None), own) if channel_axis == 1 else (..., own)
        alone = case.with_(num_groups=1)
        got = run(alone, *(np.ascontiguousarray(a[at]) for a in (x, dy)), weight[own], bias[own])
        assert_same_bits(got, (y[at], mean[:, g : g + 1], rstd[:, g : g + 1], dx[at]))


@pytest.mark.parametrize("shift", range(16))
def test_place_in_memory(shift):
    """The alignment of the first cell changes nothing."""
    for case in (layer((5, 67)), rms((5, 1031)), layer((67, 5), axis=0), instance((2, 3, 61)), batch((7, 3, 11))):
        for dtype in (F32, F16):
            x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
            moved = []
            for a in (x, dy, weight):
                room = np.empty(a.size + shift, dtype)
                room[shift:] = a.reshape(-1)
                moved.append(room[shift:].reshape(a.shape))
            assert_same_bits(run(case, *moved, bias), run(case, x, dy, weight, bias))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 16, 67, 200, 401])
@pytest.mark.parametrize("make", [layer, rms])
def test_every_batch_size_and_position(make, width, dtype):
    """Rows in batches of 1 to 512, the first ones and the last ones; and one row at each of 512 positions."""
    case = make((512, width))
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    want = run(case, x, dy, weight, bias)
    for size in range(1, 512):
        for some in (slice(size), slice(512 - size, 512)):
            assert_same_bits(run(case, x[some], dy[some], weight, bias), pick(want, some))
    row = slice(37, 38)
    everywhere = run(case, *(np.repeat(a[row], 512, axis=0) for a in (x, dy)), weight, bias)
    for result, one in zip(everywhere, pick(want, row), strict=True):
        assert result is None or same_bits(result, np.repeat(one, 512, axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("width", [768, 1024, 4099])
def test_large_batches(width, dtype):
    """One row against thousands, in parallel and with other stores."""
    for make in (layer, rms):
        case = make((4097, width))
        x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
        want = run(case, x, dy, weight, bias)
        for i in (0, 1, 15, 16, 17, 1000, 4095, 4096):
            one = slice(i, i + 1)
            assert_same_bits(run(case, x[one], dy[one], weight, bias), pick(want, one))


def test_the_comparison_notices_errors():
    """Negative control: batch norm does depend on the other samples, and one changed cell is seen."""
    case = batch((37, 5, 11))
    x = case.x()
    y = case.forward(x)
    assert not same_bits(case.with_(shape=(2, 5, 11)).forward(x[:2]), y[:2])
    assert not same_bits(nudged(y), y)
