"""Promise 6: indices are 64-bit. Every family of kernels on more than 2^31 cells, forward and backward.

Arrays repeat one block of a size that divides no power of two: what a wrapped index would take is another cell. So the
right bits of every cell are known from the block, and every cell is compared; the three quick tests compare the last
rows. In 16 bits, in place where that can be.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

import _oracle
import normfast as nf
from _cases import batch, data, group, instance, layer, rms
from _checks import BF16, F16, F32, F64, assert_forward, assert_gradient, assert_same_bits, assert_stats, stat_dtype
from _oracle import LD, exact

LIMIT = 1 << 31


def available():
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


def needs(gigabytes):
    return pytest.mark.skipif(available() < gigabytes << 30, reason=f"needs {gigabytes} GB of free memory: not run")


@pytest.mark.slow
@needs(8)
@pytest.mark.parametrize("op", ["layer", "instance", "batch"])
def test_more_than_two_to_the_31_cells(op):
    """In place, in float16; the last reductions have the bits that they have alone."""
    rows, width = (1 << 21) + 3, 1025
    assert rows * width > 1 << 31
    block = data((4096, width), F16)
    x = np.empty((rows, width), F16)
    for start in range(0, rows, 4096):
        x[start : start + 4096] = block[: rows - start]
    tail = x[-5:].copy()
    if op == "layer":
        want = nf.layer_norm(tail)
        assert nf.layer_norm(x, out=x) is x
        assert_same_bits(x[-5:], want)
    elif op == "instance":
        want = nf.instance_norm(tail.reshape(1, 5, width))
        assert nf.instance_norm(x.reshape(1, rows, width), out=x.reshape(1, rows, width)) is not None
        assert_same_bits(x[-5:], want[0])
    else:
        mean, var = np.linspace(-1, 1, width), np.linspace(0.5, 2, width)
        want = nf.batch_norm(tail, mean, var)
        assert nf.batch_norm(x, mean, var, out=x) is x
        assert_same_bits(x[-5:], want)


# ---- blocks


def filled(block, count, out=None):
    """`block` over and over along axis 0, the last time perhaps in part: `count` entries."""
    out = np.empty((count, *block.shape[1:]), block.dtype) if out is None else out
    for start in range(0, count, len(block)):
        out[start : start + len(block)] = block[: count - start]
    return out


def assert_repeats(array, block, first=0):
    """Every cell of `array`, from the block that begins at `first` on, has the bits of `block`."""
    size = f"u{block.dtype.itemsize}"
    for start in range(first, len(array), len(block)):
        part = array[start : start + len(block)]
        assert (part.view(size) == block[: len(part)].view(size)).all(), f"entries from {start} on of {len(array)}"


def assert_noticed(array, block):
    """Negative control: the comparison sees one bit beyond the limit."""
    at = LIMIT // (array.size // len(array)) + 1
    array[at : at + 1].view(f"u{array.dtype.itemsize}").reshape(-1)[0] ^= 1
    with pytest.raises(AssertionError, match="entries from"):
        assert_repeats(array, block, first=at // len(block) * len(block))


def length(cells_of_an_entry, limit=LIMIT):
    """So many entries that a thousandth of the cells lie beyond the limit, and no whole number of blocks."""
    return (limit + limit // 1000) // cells_of_an_entry | 1


# ---- reductions of their own: the bits of a block do not depend on how often it is repeated

ROW_BLOCK = 1000
OWN = [
    (layer((ROW_BLOCK, 1025)), F16),
    (rms((ROW_BLOCK, 1025)), BF16),
    (rms((ROW_BLOCK, 21, 49), axis=1), F16),
    (layer((ROW_BLOCK, 12, 85), axis=1), BF16),
    (group((ROW_BLOCK, 8, 5, 25), 4), BF16),
    (group((ROW_BLOCK, 5, 25, 8), 4, channel_axis=-1), F16),
    (instance((ROW_BLOCK, 8, 127)), F16),
    (instance((ROW_BLOCK, 127, 8), channel_axis=-1), BF16),
    (batch((ROW_BLOCK, 11, 93), training=False), BF16),
    (batch((ROW_BLOCK, 93, 11), channel_axis=-1, training=False), F16),
]


@pytest.mark.slow
@pytest.mark.proof
@needs(6)
@pytest.mark.parametrize(("small", "dtype"), OWN, ids=str)
def test_forward(small, dtype):
    block, weight, bias = small.x(dtype), small.weight(F32), small.bias(F32)
    want, mean, rstd = small.forward(block, weight, bias, return_stats=True)
    n = length(block[0].size)
    large = small.with_(shape=(n, *small.shape[1:]))
    x = filled(block, n)
    y, large_mean, large_rstd = large.forward(x, weight, bias, out=x, return_stats=True)
    assert y is x
    assert y.size > LIMIT
    assert_repeats(y, want)
    for stat, right in ((large_mean, mean), (large_rstd, rstd)):
        if small.op == "batch_norm":
            assert_same_bits(stat, right)
        elif right is not None:
            assert_repeats(stat, right)
    assert_noticed(y, want)


@pytest.mark.slow
@pytest.mark.proof
@needs(10)
@pytest.mark.parametrize(("small", "dtype"), OWN, ids=str)
def test_backward(small, dtype):
    """dx, in the place of dy, to the bit; the parameter gradients against exact sums over the block."""
    block, dy_block, weight, bias = small.x(dtype), small.dy(dtype), small.weight(F32), small.bias(F32)
    _, mean, rstd = small.forward(block, weight, bias, return_stats=True)
    want = small.backward(dy_block, block, mean, rstd, weight, needs=("x",))[0]
    n = length(block[0].size)
    large = small.with_(shape=(n, *small.shape[1:]))
    x, dy = filled(block, n), filled(dy_block, n)
    per_entry = small.op != "batch_norm"
    stats = [None if s is None else filled(s, n) if per_entry else s for s in (mean, rstd)]
    dx, *gradients = large.backward(dy, x, *stats, weight, out=dy)
    assert dx is dy
    assert dx.size > LIMIT
    assert_repeats(dx, want)
    # What one block gives, and what the part at the end gives.
    times, rest = divmod(n, len(block))
    part = small.with_(shape=(rest, *small.shape[1:]))
    stats = [None if s is None else s[:rest] if per_entry else s for s in (mean, rstd)]
    whole = small.exact_backward(dy_block, block, mean, rstd, weight)
    last = part.exact_backward(dy_block[:rest], block[:rest], *stats, weight)
    for name, gradient in zip(("dweight", "dbias"), gradients, strict=False):
        terms = np.sqrt(times * getattr(whole, name + "_terms") ** 2 + getattr(last, name + "_terms") ** 2)
        assert_gradient(gradient, times * getattr(whole, name) + getattr(last, name), terms)
    assert_noticed(dx, want)


@pytest.mark.slow
@pytest.mark.proof
@needs(11)
def test_more_than_two_to_the_32_cells():
    """Where unsigned numbers of 32 bits end as well."""
    small = layer((ROW_BLOCK, 1025))
    block = small.x(BF16)
    want = small.forward(block)
    n = length(1025, 2 * LIMIT)
    x = filled(block, n)
    assert x.size > 1 << 32
    assert_repeats(nf.layer_norm(x, out=x), want)


@pytest.mark.slow
@pytest.mark.proof
@needs(15)
@pytest.mark.parametrize("small", [layer((ROW_BLOCK, 1025)), batch((ROW_BLOCK, 41, 25), training=False)], ids=str)
def test_strided(small):
    """Rows with a gap behind each, which are gathered and scattered, in place."""
    block = small.x(F16)
    want = small.forward(block)
    n = length(block[0].size)
    wide = np.full((n, *block.shape[1:-1], block.shape[-1] + 1), 7, F16)
    x = filled(block, n, wide[..., :-1])
    assert not x.flags.c_contiguous
    large = small.with_(shape=x.shape)
    assert large.forward(x, out=x) is x
    assert x.size > LIMIT
    assert_repeats(x, want)
    for start in range(0, n, 1 << 16):
        assert (wide[start : start + (1 << 16), ..., -1] == 7).all()


# ---- reductions across the whole array: exact statistics from the two parts that it has

ENTRIES = 1_000_000  # cells of a block

# Cases whose long axis is the first, or follows axes of length 1: what n entries along it are a case of.
ACROSS = {
    "one row": (lambda n: layer((n,)), F16),
    "one channel": (lambda n: instance((1, 1, n)), BF16),
    "one sample, channels last": (lambda n: instance((1, n, 10), channel_axis=-1), F16),
    "one sample, groups, channels last": (lambda n: group((1, n, 20), 5, channel_axis=-1), BF16),
    "columns": (lambda n: layer((n, 1000), axis=0), F16),
    "batch, NC": (lambda n: batch((n, 1000)), BF16),
    "batch, NCHW": (lambda n: batch((n, 10, 100)), F16),
    "batch, channels last": (lambda n: batch((n, 10, 10), channel_axis=-1), BF16),
}


class Part:
    """A case with its x and dy, and how often they stand in the whole."""

    def __init__(self, case, dtype, times, seed, size):
        self.case, self.times = case, times
        self.x = (case.x(F64, seed) * size).astype(dtype)
        self.dy = (case.dy(F64, 10 + seed) * size).astype(dtype)

    def rows(self, array):
        return self.case.geometry.rows(array)

    def standardised(self, mean, rstd):
        return (self.rows(self.x) - exact(mean).reshape(-1, 1)) * exact(rstd).reshape(-1, 1)


class Whole:
    """A block over and over, up to the limit; beyond it large numbers, without which every statistic is another."""

    def __init__(self, of, dtype):
        entry = of(2).geometry.cells.size // 2
        self.n, block = length(entry), ENTRIES // entry
        self.times = LIMIT // ENTRIES
        self.split = self.times * block
        self.case = of(self.n)
        self.parts = [Part(of(block), dtype, self.times, 0, 1), Part(of(self.n - self.split), dtype, 1, 1, 20)]

    def entries(self, array):
        """The long axis first."""
        return array.reshape(self.n, -1)

    def array(self, name):
        block, tail = (getattr(part, name) for part in self.parts)
        out = np.empty(self.case.shape, block.dtype)
        entries = self.entries(out)
        filled(block.reshape(self.split // self.times, -1), self.split, entries[: self.split])
        entries[self.split :] = tail.reshape(self.n - self.split, -1)
        return out

    def divided(self, array):
        """A result as it is of either part, after a look at all repetitions of the first."""
        block, tail = self.parts
        entries = self.entries(array)
        first = entries[: self.split // self.times]
        assert_repeats(entries[: self.split], first)
        return first.reshape(block.case.shape), entries[self.split :].reshape(tail.case.shape)


def mean_of(parts, rows_of):
    """The exact mean of every reduction, of what `rows_of` makes of a part."""
    rows = [rows_of(part) for part in parts]
    total = sum(part.times * r.sum(axis=1, keepdims=True) for part, r in zip(parts, rows, strict=True))
    return total / sum(part.times * r.shape[1] for part, r in zip(parts, rows, strict=True))


def moments(parts):
    """Mean and variance of every reduction."""
    first = mean_of(parts, lambda part: part.rows(part.x))
    return first, mean_of(parts, lambda part: (part.rows(part.x) - first) ** 2)


@pytest.mark.slow
@pytest.mark.proof
@needs(6)
@pytest.mark.parametrize("name", ACROSS)
def test_forward_across(name):
    whole = Whole(*ACROSS[name])

    def want(part, parts):
        mean, var = moments(parts)
        return _oracle.forward(part.case.geometry, part.x, eps=part.case.eps, mean=mean, var=var)

    x = whole.array("x")
    y, mean, rstd = whole.case.forward(x, out=x, return_stats=True)
    assert y is x
    assert y.size > LIMIT
    for part, got in zip(whole.parts, whole.divided(y), strict=True):
        right = want(part, whole.parts)
        assert_forward(got, right)
        assert_stats(mean, rstd, right, y.dtype)
        # Negative control: the cells beyond the limit count.
        with pytest.raises(AssertionError, match="ulp"):
            assert_forward(got, want(part, whole.parts[:1]))


@pytest.mark.slow
@pytest.mark.proof
@needs(10)
@pytest.mark.parametrize("name", ACROSS)
def test_backward_across(name):
    whole = Whole(*ACROSS[name])
    case = whole.case
    dtype = stat_dtype(whole.parts[0].x.dtype)
    first, var = moments(whole.parts)
    shape = case.stat_shape
    mean = first.astype(dtype).reshape(shape)
    rstd = (1 / np.sqrt(var + LD(case.eps))).astype(dtype).reshape(shape)
    x, dy = whole.array("x"), whole.array("dy")
    # Parameters of a layer norm would be as many as its long axis has entries.
    weight = None if case.op == "layer_norm" else np.ones(case.param_shape, F32)
    dx, *gradients = case.backward(dy, x, mean, rstd, weight, out=dy)
    assert dx is dy
    assert dx.size > LIMIT

    def want(part, parts):
        scale = exact(rstd).reshape(-1, 1)
        one = mean_of(parts, lambda p: p.rows(p.dy))
        two = mean_of(parts, lambda p: p.rows(p.dy) * p.standardised(mean, rstd))
        terms = [scale * part.rows(part.dy), scale * one, scale * two * part.standardised(mean, rstd)]
        norm = float(np.sqrt(sum((np.broadcast_to(t, terms[0].shape) ** 2).sum() for t in terms)))
        return part.case.geometry.unrows(terms[0] - terms[1] - terms[2]), norm

    for part, got in zip(whole.parts, whole.divided(dx), strict=True):
        assert_gradient(got, *want(part, whole.parts))
        with pytest.raises(AssertionError, match="gradient off"):
            assert_gradient(got, *want(part, whole.parts[:1]))
    if weight is None:
        return
    products = [lambda p: p.rows(p.dy) * p.standardised(mean, rstd), lambda p: p.rows(p.dy)]
    for gradient, product in zip(gradients, products, strict=True):
        total = sum(p.times * p.case.geometry.sum_by_parameter(product(p)) for p in whole.parts)
        terms = float(np.sqrt(sum(p.times * (product(p) ** 2).sum() for p in whole.parts)))
        assert_gradient(gradient, total, terms)
