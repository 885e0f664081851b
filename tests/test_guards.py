"""No byte outside an array is touched, and where an array starts changes no bit.

Every array lies between two pages that kill the process, at their edges: first from the left one on, then up to the
right one. Around what is written the bytes must stay.
"""

from __future__ import annotations

import signal
import sys

import pytest

import _child

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect")]

PRELUDE = """
import ctypes, mmap, sys
import numpy as np
import normfast as nf
from _cases import batch, group, instance, layer, rms
from _checks import BF16, F16, F32, F64, bits

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

class Fence:
    '''Memory between two pages that nobody may touch.'''
    def __init__(self, size):
        size = (size + PAGE - 1) // PAGE * PAGE
        self.map = mmap.mmap(-1, size + 2 * PAGE)
        all = np.frombuffer(self.map, np.uint8)
        self.address = all.ctypes.data
        for at in (self.address, self.address + PAGE + size):
            assert libc.mprotect(at, PAGE, 0) == 0
        self.bytes = all[PAGE:-PAGE]

    def place(self, shape, dtype, offset, left):
        '''An array that starts `offset` bytes after the left page, or ends as many before the right one.'''
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.start = offset if left else len(self.bytes) - offset - count
        self.end = self.start + count
        return self.bytes[self.start : self.end].view(dtype).reshape(shape)

    def put(self, values, offset, left):
        array = self.place(values.shape, values.dtype, offset, left)
        array[...] = values
        return array

    def result(self, shape, dtype, offset, left):
        self.bytes[:] = 0xA5
        return self.place(shape, dtype, offset, left)

    def neighbours_are_whole(self):
        return (self.bytes[: self.start] == 0xA5).all() and (self.bytes[self.end :] == 0xA5).all()

def check(case, dtype, offsets, fences):
    '''Forward and backward with every array at every offset from either page, in place as well.'''
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
    right = [bits(a) for a in case.backward(dy, x, mean, rstd, weight) if a is not None]
    calls = 0
    for offset in offsets:
        for left in (True, False):
            at = (offset, left)
            given = (x, dy, weight, bias, mean, rstd)
            xs, dys, ws, bs, ms, rs = (None if a is None else f.put(a, *at) for f, a in zip(fences, given))
            out = fences[6].result(x.shape, dtype, *at)
            case.forward(xs, ws, bs, out=out)
            assert out.tobytes() == y.tobytes(), (str(case), str(dtype), at, "y")
            assert fences[6].neighbours_are_whole(), (str(case), str(dtype), at, "beside y")
            out = fences[6].result(x.shape, dtype, *at)
            got = case.backward(dys, xs, ms, rs, ws, out=out)
            assert [bits(a) for a in got if a is not None] == right, (str(case), str(dtype), at, "gradients")
            assert fences[6].neighbours_are_whole(), (str(case), str(dtype), at, "beside dx")
            case.forward(xs, ws, bs, out=xs)
            assert xs.tobytes() == y.tobytes(), (str(case), str(dtype), at, "in place")
            calls += 3
    return calls
"""

LENGTHS = (
    PRELUDE
    + """
nf.set_num_threads(1)
lengths, offsets = range(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), eval(sys.argv[4])
fences = [Fence(4096 * 8 + 64) for _ in range(7)]
calls = 0
for n in lengths:
    for dtype in (F32, F64, F16, BF16):
        size = dtype.itemsize
        calls += check(layer((n,)) if n else layer((0, 3)), dtype, offsets(size), fences)
        calls += check(rms((n,)) if n else rms((0, 3)), dtype, offsets(size), fences)
print(calls)
"""
)

SHAPES = (
    PRELUDE
    + """
nf.set_num_threads(2)
offsets = eval(sys.argv[1])
fences = [Fence(1 << 19) for _ in range(7)]
calls = 0
for n in (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 49, 64, 65, 100, 131):
    for case in (
        layer((7, n)), layer((7, n), axis=0), layer((40, n), axis=0), layer((2, 300, n), axis=1),
        layer((2, n, 3), axis=1), rms((21, n)),
        group((2, 6, n), 3), group((2, n, 6), 3, channel_axis=-1), group((2, n, 64), 4, channel_axis=-1),
        instance((3, 5, n)), instance((3, n, 5), channel_axis=-1), batch((5, 7, n)), batch((5, n, 7), channel_axis=-1),
        batch((70, n)), batch((n + 1, 70)),
    ):
        for dtype in (F32, BF16):
            size = dtype.itemsize
            calls += check(case, dtype, offsets(size), fences)
print(calls)
"""
)

LARGE = (
    PRELUDE
    + """
fences = [Fence(4 << 20) for _ in range(7)]
calls = 0
for threads in (1, 2):
    nf.set_num_threads(threads)
    for case in (
        layer((16, 40, 1000), axis=1), layer((3, 300, 900), axis=1), layer((700, 1000)), rms((9000, 70)),
        group((16, 300, 128), 4, channel_axis=-1), group((16, 32, 1100), 4),
        instance((16, 300, 128), channel_axis=-1), instance((40, 64, 250)),
        batch((16, 300, 128), channel_axis=-1), batch((16, 128, 300)), batch((300, 2100)),
    ):
        for dtype in (F32, BF16):
            calls += check(case, dtype, (0, dtype.itemsize), fences)
print(calls)
"""
)


def test_every_length():
    """Rows of up to 140 cells, every start at a multiple of the cell within 64 bytes."""
    assert int(_child.output(LENGTHS, 0, 141, 1, "lambda size: range(0, 64, size)", timeout=900)) > 70_000


def test_every_start():
    """All of 64 bytes, so cells at no multiple of their size, too."""
    assert int(_child.output(LENGTHS, 0, 101, 4, "lambda size: range(64)", timeout=900)) > 20_000


def test_shapes():
    """Every way through the kernels of columns and planes."""
    assert int(_child.output(SHAPES, "lambda size: (0, size, 3 * size, 64 - size)", timeout=900)) > 10_000


def test_larger_than_a_cache():
    """What the second-level cache does not hold is brought there, but nothing beside it."""
    assert int(_child.output(LARGE, timeout=900)) == 2 * 11 * 2 * 4 * 3


@pytest.mark.proof
def test_shapes_at_every_start():
    """The same at each of 64 bytes."""
    assert int(_child.output(SHAPES, "lambda size: range(64)", timeout=3600)) > 170_000


@pytest.mark.proof
@pytest.mark.parametrize("first", range(8))
def test_every_length_to_4096(first):
    """All of 0 to 4096 cells at each of 64 bytes, in eighths."""
    assert int(_child.output(LENGTHS, first, 4097, 8, "lambda size: range(64)", timeout=7200)) > 1_500_000


@pytest.mark.parametrize(
    "beyond", ["fences[0].bytes.ctypes.data - 1", "fences[0].bytes.ctypes.data + len(fences[0].bytes)"]
)
def test_the_pages_are_guarded(beyond):
    """Negative control: one byte beyond either edge ends the process."""
    done = _child.spawn(PRELUDE + f"fences = [Fence(4096)]\nctypes.string_at({beyond}, 1)")
    # AddressSanitizer takes the signal, and exits with a status of its own.
    assert done.returncode == -signal.SIGSEGV or "AddressSanitizer: SEGV on unknown address" in done.stderr


def test_a_changed_neighbour_is_noticed():
    """Negative control: a byte beside the result."""
    code = """
fence = Fence(4096)
out = fence.result((3, 5), F32, 4, True)
out[:] = 1
assert fence.neighbours_are_whole()
fence.bytes[fence.end] = 0
assert not fence.neighbours_are_whole()
"""
    _child.output(PRELUDE + code)
