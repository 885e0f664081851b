"""What happens when the system refuses the k-th allocation, mapping or thread, for every k until a call needs no more.

A MemoryError and nothing written, or the right bits; never a crash, a hang or a leak, and the next call is right. The
failures come from `faults/failing.c`, which stands before malloc, mmap and pthread_create in a child process; Python
and NumPy ask through it as well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import _child

SOURCE = Path(__file__).parent / "faults" / "failing.c"
COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD and glibc"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(
        "libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer has a malloc of its own"
    ),
]

PRELUDE = """
import ctypes, gc, json, os, sys
import numpy as np
import normfast as nf
from _cases import batch, group, instance, layer, rms
from _checks import BF16, F32, bits

shim = ctypes.PyDLL(sys.argv[1])
shim.failing_call.argtypes = [ctypes.py_object, ctypes.c_int, ctypes.c_long, ctypes.c_int]
shim.failing_call.restype = ctypes.py_object
shim.failing_count.restype = ctypes.c_long
HEAP, MAPS, THREADS = 1, 2, 4

CASES = [
    layer((7, 33)), layer((3, 19, 6, 7), axis=1), layer((9, 70_001)), layer((2, 300, 4099), axis=1), rms((300, 4099)),
    group((3, 12, 5, 7), 4), group((3, 5, 7, 12), 4, channel_axis=-1), group((2, 8, 300, 301), 2),
    instance((3, 12, 5, 7)), instance((2, 300, 301, 7), channel_axis=-1), batch((6, 11, 5, 7)), batch((71, 37)),
    batch((4099, 300)), batch((4, 8, 200, 201)), batch((6, 11, 35), training=False), batch((300, 4099), training=False),
    layer((3, 19, 6, 7), axis=1, permutation=(0, 2, 3, 1)), layer((5, 7, 33), axis=(0, 2)),
    layer((3, 5, 6, 7), axis=(1, 2), permutation=(0, 2, 1, 3)),
]

def entry_points(case, dtype):
    '''(name, call, arrays it writes to): forward and backward, with new arrays and into given ones.'''
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    running = case.running(F32)
    kw = {"running": running} if running else {}
    forward = lambda **more: case.forward(x, weight, bias, **kw, **more)
    updated = list(running) if running and case.training else []
    kept = [a.copy() for a in updated]
    y, mean, rstd = forward(return_stats=True)
    for a, b in zip(updated, kept):
        np.copyto(a, b)
    out, into = np.full_like(x, 7), np.full_like(x, 7)
    backward = lambda **more: case.backward(dy, x, mean, rstd, weight, **more)
    yield "forward", lambda: forward(return_stats=True), updated
    yield "forward, out", lambda: forward(out=out), [out, *updated]
    yield "backward", backward, []
    yield "backward, out", lambda: backward(out=into), [into]
    yield "dx, out", lambda: backward(needs=("x",), out=into), [into]

def copying_calls():
    '''(name, call, arrays it writes to) where NumPy copies or casts before the kernels or after them.'''
    case = layer((7, 33))
    x, dy, weight, bias = case.x(), case.dy(), case.weight(), case.bias()
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
    wide = np.zeros((7, 66), F32)
    yield "integers", lambda: nf.layer_norm(np.arange(231).reshape(7, 33)), []
    yield "byteswapped", lambda: nf.layer_norm(x.astype(">f4"), weight.astype(">f4"), bias.astype(float)), []
    yield "strided out", lambda: nf.layer_norm(x, weight, bias, out=wide[:, ::2]), [wide]
    yield "dy down the columns", lambda: nf.layer_norm_backward(np.asfortranarray(dy), x, mean, rstd, weight), []
    images = group((3, 12, 5, 7), 4).x()
    turned = np.ascontiguousarray(images.transpose(1, 0, 2, 3)).transpose(1, 0, 2, 3)  # channels first in memory
    y, mean, rstd = nf.group_norm(turned, 4, return_stats=True)
    yield "channels first in memory", lambda: nf.group_norm(turned, 4), []
    yield "the same, backward", lambda: nf.group_norm_backward(turned, turned, mean, rstd), []
    cube, gathered = layer((5, 7, 33), axis=(0, 2)).x(), np.zeros((5, 7, 33), F32)
    yield "gathered axes", lambda: nf.layer_norm(cube, axis=(0, 2), out=gathered), [gathered]

def flat(result):
    return [bits(a) for a in (result if isinstance(result, tuple) else (result,)) if a is not None]

def sweep(call, written, kinds, forever):
    '''Failures until the call needs no more; how many there were.'''
    start = [a.copy() for a in written]
    def afresh():
        for a, b in zip(written, start):
            np.copyto(a, b)
    def again():
        afresh()
        return flat(call()) + [a.tobytes() for a in written]
    right = again()
    k = injected = 0
    while True:
        k += 1
        afresh()
        gc.collect()  # and with it Python's lists of free tuples: a new one is an allocation then
        try:
            result = shim.failing_call(call, kinds, k, forever)
        except MemoryError:
            result = None
        count = shim.failing_count()
        injected += count
        if result is None:
            for i, (a, b) in enumerate(zip(written, start)):
                assert a.tobytes() == b.tobytes(), (k, i, "refused, and written to")
        else:
            found = flat(result) + [a.tobytes() for a in written]
            assert found == right, (k, "a call that went on has other bits")
        del result
        assert again() == right, (k, "the next call has other bits")
        if count == 0:
            afresh()
            return injected
        assert k < 20_000
"""

MEMORY = (
    PRELUDE
    + """
nf.set_num_threads(3)
gc.freeze()  # what is there by now is not looked through again
kinds = {"heap": HEAP, "maps": MAPS, "both": HEAP | MAPS}[sys.argv[2]]
total = {}
for case in CASES:
    for dtype in (F32, BF16):
        for name, call, written in entry_points(case, dtype):
            for forever in (0, 1):
                for pooled in (True, False):
                    nf.release_pool()
                    nf.set_pool_limit((1 << 28) if pooled else 0)
                    total[name] = total.get(name, 0) + sweep(call, written, kinds, forever)
for name, call, written in copying_calls():
    total[name] = sum(sweep(call, written, kinds, forever) for forever in (0, 1))
print(json.dumps(total))
"""
)
ENTRY_POINTS = {"forward", "forward, out", "backward", "backward, out", "dx, out"}


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = tmp_path_factory.mktemp("faults") / "failing.so"
    command = [COMPILER, "-std=gnu11", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", library, SOURCE, "-ldl"], check=True)
    return library


def child(code, shim, *arguments, **env):
    return _child.output(code, shim, *arguments, LD_PRELOAD=str(shim), timeout=900, **env)


@pytest.mark.parametrize("kinds", ["maps", "both"])
def test_memory(shim, kinds):
    """Every entry point, each failure alone and from then on, with a pool and without."""
    total = json.loads(child(MEMORY, shim, kinds))
    print(kinds, total)
    assert total.keys() > ENTRY_POINTS
    # Small results come from the heap, large ones from mappings; `out` needs neither, and no workspace is a mapping.
    assert all(total[name] > 0 for name in ENTRY_POINTS if kinds != "maps" or "out" not in name)


def test_memory_of_small_objects(shim):
    """The same where Python takes each object from malloc: argument lists, tuples, exceptions."""
    total = json.loads(
        child(MEMORY.replace("for dtype in (F32, BF16)", "for dtype in (F32,)"), shim, "heap", PYTHONMALLOC="malloc")
    )
    print(total)
    assert all(total[name] > 1000 for name in ENTRY_POINTS)
    assert all(count > 10 for count in total.values())


LEAKS = (
    PRELUDE
    + """
class Used(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(n, ctypes.c_size_t) for n in names.split()]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Used
def used():
    gc.collect()
    info = mallinfo()
    return info.uordblks + info.hblkhd

nf.set_num_threads(2)
nf.set_pool_limit(0)
cases = CASES[:: int(sys.argv[2])]
calls = [(call, written) for case in cases for _, call, written in entry_points(case, F32)]
gc.freeze()
def everything():
    return sum(sweep(call, written, HEAP | MAPS, forever) for call, written in calls for forever in (0, 1))
everything(), everything()  # the interpreter's caches are full after two rounds
before = used()
injected = sum(everything() for _ in range(2))
print(json.dumps({"injected": injected, "grown": used() - before}))
"""
)


@pytest.mark.parametrize("step", [2, pytest.param(1, marks=pytest.mark.proof)])
def test_no_leak(shim, step):
    """Thousands of failures later the heap is as large as before, Python's own objects included."""
    ran = json.loads(child(LEAKS, shim, step, PYTHONMALLOC="malloc"))
    print(ran)
    assert ran["injected"] > 5000
    # An object has 50 bytes: one lost in every tenth failure would be more. Half as much is the interpreter's own.
    assert ran["grown"] < 3 * ran["injected"]


NO_THREADS = (
    PRELUDE
    + """
case = layer((300, 4099))
name, call, written = next(entry_points(case, F32))
nf.set_num_threads(1)
right = flat(call())
nf.set_num_threads(6)
injected = 0
for kinds in (THREADS, HEAP | THREADS):
    for forever in (0, 1):
        k = 0
        while True:
            k += 1
            read, write = os.pipe()
            pid = os.fork()  # the child has no pool yet: its first call makes the threads
            if pid == 0:
                try:
                    try:
                        good = flat(shim.failing_call(call, kinds, k, forever)) == right
                    except MemoryError:
                        good = True
                    count = shim.failing_count()
                    nf.set_num_threads(7)
                    good = good and flat(call()) == right
                    os.write(write, json.dumps([good, count]).encode())
                finally:
                    os._exit(0)
            os.close(write)
            answer = os.read(read, 1000)
            os.close(read)
            assert os.waitpid(pid, 0)[1] == 0 and answer, (kinds, k, forever, "the child died")
            good, count = json.loads(answer)
            assert good, (kinds, k, forever)
            injected += count
            if count == 0:
                break
print(injected)
"""
)


def test_threads(shim):
    """Threads that cannot be made are done without: the same bits, and the next call tries again."""
    assert int(child(NO_THREADS, shim)) >= 10


def test_the_shim_fails_what_it_should(shim):
    """Negative control: NumPy's own allocation fails under it, the first time and not the second."""
    code = (
        PRELUDE
        + """
make = lambda: np.empty(1 << 16)
for expected in (True, False):
    try:
        shim.failing_call(make, HEAP, 1 if expected else 1000, 0)
        print("made", shim.failing_count())
    except MemoryError:
        print("refused", shim.failing_count())
"""
    )
    assert child(code, shim).split() == ["refused", "1", "made", "0"]
