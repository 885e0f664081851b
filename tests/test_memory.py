"""The pool of recycled results, and that no call takes a temporary as large as x."""

from __future__ import annotations

import gc
import json
import os
import threading

import numpy as np
import pytest

import _child
import normfast as nf
from _cases import data
from _checks import F32, assert_same_bits

MB = 1 << 20
LARGE = (4096, 1024)  # 16 MB of float32


@pytest.fixture
def x():
    return np.resize(data((64, 1024)), LARGE)


def same_block(a, address):
    """Within a block a result may be moved by less than a few pages, so that it does not alias with the input."""
    return abs(a.ctypes.data - address) < 1 << 16


def test_results_are_recycled(pool, x):
    """The memory of a result that is gone is that of the next of its size."""
    y = nf.layer_norm(x)
    address = y.ctypes.data
    assert pool()["held"] == 0
    del y
    assert pool()["held"] >= x.nbytes
    y = nf.rms_norm(x)
    assert same_block(y, address)
    assert pool()["held"] == 0


def test_backward_is_recycled_too(pool, x):
    y, mean, rstd = nf.layer_norm(x, return_stats=True)
    dx = nf.layer_norm_backward(y, x, mean, rstd)[0]
    address = dx.ctypes.data
    want = dx.copy()
    del dx
    assert pool()["held"] >= x.nbytes
    dx = nf.layer_norm_backward(y, x, mean, rstd)[0]
    assert same_block(dx, address)
    assert_same_bits(dx, want)


def test_stale_data_do_not_show(pool, x):
    """A recycled block full of NaN or of another result gives the same bits as a fresh one."""
    want = nf.layer_norm(x).copy()
    for value in (np.nan, 7.0):
        nf.layer_norm(x).fill(value)
        gc.collect()
        assert pool()["held"] >= x.nbytes
        assert_same_bits(nf.layer_norm(x), want)


def test_live_results_stay_intact(pool, x):
    """Views, slices and results kept alive are never given to anyone else."""
    want = nf.layer_norm(x).copy()
    kept = nf.layer_norm(x)
    view = nf.layer_norm(x)[::7, ::3]
    row = nf.layer_norm(x)[5]
    memory = memoryview(nf.layer_norm(x))
    for _ in range(6):
        nf.layer_norm(x * F32.type(2) + F32.type(1)).fill(-1)
        nf.release_pool()
    assert_same_bits(kept, want)
    assert_same_bits(view.copy(), want[::7, ::3])
    assert_same_bits(row.copy(), want[5])
    assert_same_bits(np.asarray(memory), want)


def test_results_do_not_share_memory(pool, x):
    results = [nf.layer_norm(x) for _ in range(4)]
    for i, a in enumerate(results):
        assert not any(np.shares_memory(a, b) for b in results[:i])


def test_limit_is_respected(pool, x):
    limit = 40 * MB
    nf.set_pool_limit(limit)
    results = [nf.layer_norm(x) for _ in range(5)]
    while results:
        results.pop()
        assert pool()["held"] <= limit
    assert pool()["held"] >= x.nbytes
    nf.set_pool_limit(x.nbytes // 2)
    assert pool()["held"] <= x.nbytes // 2


def test_zero_turns_it_off(pool, x):
    nf.layer_norm(x)
    assert pool()["held"] > 0
    nf.set_pool_limit(0)
    assert pool() == {"limit": 0, "held": 0}
    want = nf.layer_norm(x)
    nf.layer_norm(x)
    assert pool()["held"] == 0
    assert_same_bits(nf.layer_norm(x), want)


def test_release(pool, x):
    limit = pool()["limit"]
    kept = nf.layer_norm(x)
    want = kept.copy()
    nf.layer_norm(x)
    assert pool()["held"] > 0
    nf.release_pool()
    assert pool() == {"limit": limit, "held": 0}
    assert_same_bits(kept, want)


def test_freed_in_another_thread(pool, x):
    want = nf.layer_norm(x).copy()
    for _ in range(10):
        box = [nf.layer_norm(x)]
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
        assert_same_bits(nf.layer_norm(x), want)
    assert pool()["held"] <= pool()["limit"]


def test_many_threads_take_and_give(pool, x):
    want = nf.layer_norm(x[:1024]).copy()
    faults = []

    def work():
        kept = []
        for i in range(30):
            kept.append(nf.layer_norm(x[:1024]))
            if i % 3 == 2:
                kept.pop(0)
                if not all(np.array_equal(k, want) for k in kept[-2:]):
                    faults.append(i)
                del kept[:-1]

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults
    assert pool()["held"] <= pool()["limit"]


def test_an_error_leaks_nothing(pool, x):
    """A refused call keeps no block."""
    nf.layer_norm(x)
    held = pool()["held"]
    for _ in range(5):
        with pytest.raises(ValueError, match="weight"):
            nf.layer_norm(x, np.ones(3, F32))
        with pytest.raises(ValueError, match="out"):
            nf.layer_norm(x, out=x[::-1])
    assert pool()["held"] == held


def test_memory_does_not_grow():
    """Hundreds of calls of many sizes later, the process is no larger: what is held stays under the limit."""
    code = """
import resource, normfast as nf, numpy as np
nf.set_pool_limit(32 << 20)
x = np.ones((4096, 1024), np.float32)
def calls(seed):
    r = np.random.default_rng(seed)
    for _ in range(30):
        part = x[: r.integers(1, 4097)]
        y, mean, rstd = nf.layer_norm(part, return_stats=True)
        nf.layer_norm_backward(y, part, mean, rstd)
        del y
        assert nf.show_config("dicts")["pool"]["held"] <= 32 << 20
calls(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for seed in range(1, 5):
    calls(seed)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    pytest.importorskip("resource", reason="peak memory is not known without the resource module")
    shadow = 48 if "libtsan" in os.environ.get("LD_PRELOAD", "") else 0  # ThreadSanitizer's own share grows by 18 MB
    assert int(_child.output(code)) < (16 + shadow) * 1024


PEAK = """
import json, os, resource, sys
import normfast as nf
import numpy as np
from _cases import batch, group, instance, layer, rms
from _checks import BF16, F32

UNIT = 1 if sys.platform == "darwin" else 1024

SMALL = [
    layer((30, 1024)), layer((2, 20000)), layer((300, 16)), layer((2, 64, 64), axis=1), rms((30, 1024)),
    group((2, 8, 16, 16), 4), group((2, 16, 16, 8), 4, channel_axis=-1), instance((2, 8, 16, 16)),
    batch((2, 8, 16, 16)), batch((30, 64)), batch((30, 64), training=False),
]

def grown(call):
    # Bytes that a call adds to the peak of a process that has all arguments in memory, less those of its results.
    # In a child of its own: the peak of a process never falls. A fork does not hand on which pages of files (the
    # interpreter, the libraries) are in memory: calls on little data bring them in first.
    read, write = os.pipe()
    if os.fork() == 0:
        for case in SMALL:
            a = np.ones(case.shape, x.dtype)
            running = tuple(np.ones((2, *case.param_shape), np.float32)) if case.op == "batch_norm" else None
            _, m, r = case.forward(a, return_stats=True, **({"running": running} if running else {}))
            case.backward(a, a, m, r)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        results = call()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        own = sum(r.nbytes for r in results if r is not None and r is not out)
        os.write(write, str((after - before) * UNIT - own).encode())
        os._exit(0)
    os.wait()
    os.close(write)
    size = int(os.read(read, 100))
    os.close(read)
    return size

nf.set_num_threads(2)
nf.set_pool_limit(0)
found = {}
LARGE = [
    layer((8192, 1024)), layer((8, 1 << 20)), layer((16, 1 << 19)), layer((32, 1 << 19)),
    layer((1 << 19, 16)), layer((1 << 20, 4)), layer((8, 1024, 1024), axis=1), layer((8, 4, 1 << 18), axis=1),
    layer((1024, 8192), axis=0), rms((8192, 1024)), rms((8, 1024, 1024), axis=1),
    group((8, 64, 128, 128), 8), group((8, 128, 128, 64), 8, channel_axis=-1),
    instance((8, 64, 128, 128)), instance((8, 128, 128, 64), channel_axis=-1),
    batch((8, 64, 128, 128)), batch((8, 128, 128, 64), channel_axis=-1), batch((8192, 1024)),
    batch((8, 64, 128, 128), training=False), batch((8, 64, 128, 128), permutation=(0, 2, 3, 1)),
    group((8, 64, 128, 128), 8, permutation=(0, 2, 3, 1)), layer((1024, 8192), permutation=(1, 0)),
]
for dtype in (F32, BF16):
    for case in LARGE:
        order = case.permutation or tuple(range(len(case.shape)))
        x, dy, out = (np.full([case.shape[p] for p in order], v, dtype).transpose(np.argsort(order)) for v in (3, 1, 0))
        x[..., 0] = 5
        weight = np.ones(case.param_shape, dtype)
        bias = weight if case.has_bias else None
        running = tuple(np.ones((2, *case.param_shape), np.float32)) if case.op == "batch_norm" else None
        kw = {"running": running} if running else {}
        _, mean, rstd = case.forward(x, weight, bias, return_stats=True, **kw)
        forward = grown(lambda: [case.forward(x, weight, bias, out=out, **kw)])
        backward = grown(lambda: case.backward(dy, x, mean, rstd, weight, out=out))
        allowed = 1 << 20  # tables, stacks of threads, what Python does meanwhile
        found[f"{case}-{dtype}"] = [(size - allowed) / x.nbytes for size in (forward, backward)]
# Negative control: a temporary as large as x shows.
found["control"] = [grown(lambda: [(x == 3).astype(x.dtype).sum()[None][:0]]) / x.nbytes]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_no_temporary_as_large_as_x():
    """Peak memory of every norm and layout on contiguous x, with the memory of y or dx given."""
    pytest.importorskip("resource", reason="peak memory is not known without the resource module")
    # Memory that the allocator keeps back for itself would hide a temporary: large blocks come from the system.
    straight = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    code = "import warnings; warnings.simplefilter('ignore')\n" + PEAK
    found = json.loads(_child.output(code, timeout=600, **straight))
    assert found.pop("control")[0] > 0.9
    large = {case: parts for case, parts in found.items() if max(parts) > 0.9}
    assert not large, f"peak memory beyond x, y, parameters, over x.nbytes, forward and backward: {large}"
