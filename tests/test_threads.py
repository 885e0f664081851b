"""Promise 1, the number of threads: it changes no bit. And promise 6: callers on several Python threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import _child
import normfast as nf
from _cases import batch, data, group, instance, layer, rms
from _checks import BF16, DTYPES, F16, F32, F64, assert_same_bits, nudged

# Large enough to be cut into many pieces: a million cells of odd extents, tall, wide, and with few reductions.
LARGE = [
    layer((4099, 257)),
    layer((3, 340_007)),
    layer((61, 131, 129), axis=1),
    layer((20_011, 53), axis=0),
    layer((53, 131, 149), axis=(0, 2)),
    layer((1_000_003,)),
    rms((4099, 257)),
    rms((3, 340_007)),
    rms((20_011, 53), axis=0),
    group((5, 24, 93, 91), 6),
    group((2, 6, 301, 277), 2),
    group((5, 93, 91, 24), 6, channel_axis=-1),
    instance((7, 19, 89, 87)),
    instance((7, 89, 87, 19), channel_axis=-1),
    batch((7, 19, 89, 87)),
    batch((7, 89, 87, 19), channel_axis=-1),
    batch((2, 3, 170_003)),
    batch((4099, 257)),
    batch((340_007, 3)),
    batch((20_011, 100)),
    batch((7, 19, 89, 87), training=False),
    batch((7, 89, 87, 19), channel_axis=-1, training=False),
    # Backward: rows so wide that threads share each, and so many that their parameter gradients are several blocks.
    layer((150, 8209)),
    layer((40, 4099)),  # a single block, whole groups at a time
    group((150, 5600, 3), 2),
]
COUNTS = (1, 2, 3, 7)  # of all cases; 5, 8, 16 and 64 of the slow ones


def everything(case, dtype, x=None):
    """Forward, statistics, running statistics and all gradients of one case."""
    x = case.x(dtype) if x is None else x
    dy, weight, bias = case.dy(dtype), case.weight(dtype), case.bias(dtype)
    running = case.running(F32)
    kw = {"running": running} if running else {}
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True, **kw)
    gradients = case.backward(dy, x, mean, rstd, weight)
    alone = case.backward(dy, x, mean, rstd, needs=("x",))[0]
    return (y, mean, rstd, *gradients, alone, *(running or ()))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_same_bits(case, dtype, threads):
    threads(COUNTS[0])
    want = everything(case, dtype)
    for count in COUNTS[1:]:
        threads(count)
        assert_same_bits(everything(case, dtype), want)


@pytest.mark.parametrize("scale", [1e-40, *(pytest.param(s, marks=pytest.mark.slow) for s in (1e-30, 1e36))])
@pytest.mark.parametrize("case", [LARGE[0], LARGE[1], LARGE[3], LARGE[9], LARGE[13], LARGE[14], LARGE[15]], ids=str)
def test_same_bits_of_extremes(case, scale, threads):
    """Reductions that need another way than their neighbours: every fifth is far out of the usual range, one is NaN."""
    x = case.x(F64)
    cells = case.geometry.cells
    flat = x.reshape(-1)
    flat[cells[::5]] *= scale
    flat[cells[1, 0]] = np.nan
    x = flat.reshape(case.shape).astype(F32)
    results = []
    for count in COUNTS:
        threads(count)
        y, mean, rstd = case.forward(x, eps=0.0, return_stats=True)
        results.append((y, mean, rstd, *case.backward(case.dy(), x, mean, rstd, needs=case.names)))
        assert_same_bits(results[-1], results[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F16, F64], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_same_bits_other_dtypes(case, dtype, threads):
    threads(COUNTS[0])
    want = everything(case, dtype)
    for count in (*COUNTS[1:], 5, 8, 16, 64):
        threads(count)
        assert_same_bits(everything(case, dtype), want)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(12289, 1024), (24, 64, 96, 96)], ids=str)
def test_same_bits_beyond_the_caches(shape, threads):
    """Results that no cache holds, where other stores are used."""
    cases = (
        [layer(shape), layer(shape, axis=0)] if len(shape) == 2 else [batch(shape), instance(shape), group(shape, 8)]
    )
    for case in cases:
        x = np.empty(shape, F32)
        x[...] = data(shape[1:], F32)
        x *= np.linspace(0.5, 2, shape[0], dtype=F32).reshape(-1, *[1] * (len(shape) - 1))
        results = []
        for count in (1, 2, 7):
            threads(count)
            y, mean, rstd = case.forward(x, return_stats=True)
            results.append((y, *case.backward(y, x, mean, rstd, needs=case.names)))
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])


ELSEWHERE = """
import hashlib, os, sys, time
import normfast as nf
from _cases import batch, group, layer
from _checks import F32
from test_threads import everything

def digest():
    h = hashlib.sha256()
    for case in (layer((4099, 257)), layer((3, 340_007)), group((5, 24, 93, 91), 6), batch((7, 19, 89, 87))):
        for result in everything(case, F32):
            h.update(b"-" if result is None else result.tobytes())
    return h.hexdigest()

count, cpus = map(int, sys.argv[1:])
if cpus:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
nf.set_num_threads(count)
found = set()
for _ in range(3):
    found.add(digest())
    time.sleep(0.01)  # the workers fall asleep
    if allowed is not None:  # of the caller, and what the workers may use
        assert os.sched_getaffinity(0) == allowed
        for task in os.listdir("/proc/self/task"):
            assert os.sched_getaffinity(int(task)) <= allowed
print(*found)
"""


@pytest.mark.parametrize("shape", [(600, 256), (30, 7, 31, 33)])
def test_the_sign_of_zero(shape, threads):
    """A channel whose dy is zero, weight negative: one thread has its sums from one chunk, others add them up."""
    x = np.full(shape, 1 / 3, F32) + np.linspace(0, 1, shape[0], dtype=F32).reshape(-1, *[1] * (len(shape) - 1))
    dy, weight = np.zeros(shape, F32), np.full(shape[1], -1, F32)
    results = []
    for count in (1, 2, 7):
        threads(count)
        _, mean, rstd = nf.batch_norm(x, training=True, return_stats=True)
        results.append(nf.batch_norm_backward(dy, x, mean, rstd, weight))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_more_threads_than_anybody_has():
    """150 threads on any machine, more than there are shares of a loop: the bits of one."""
    assert _child.output(ELSEWHERE, 150, 0) == _child.output(ELSEWHERE, 1, 0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_processors_that_the_process_may_use():
    """One processor for three threads; what a thread may use is never more than its process was given."""
    alone = {"OPENBLAS_NUM_THREADS": "1"}  # NumPy's library starts threads before the process is given less
    assert _child.output(ELSEWHERE, 3, 1, **alone) == _child.output(ELSEWHERE, 1, 0, **alone)


WORKER = """
import os, threading, time
import numpy as np
import normfast as nf

def tasks():
    return {int(t) for t in os.listdir("/proc/self/task")}

some = threading.Thread(target=int)  # with the first thread ThreadSanitizer starts one of its own, which never sleeps
some.start()
some.join()
others = tasks()
nf.set_num_threads(2)
x = np.ones((2048, 1024), np.float32)
nf.layer_norm(x, out=x)
(worker,) = tasks() - others
"""

AWAKE = """
def run_time():
    return int(open(f"/proc/self/task/{worker}/schedstat").read().split()[0])

asleep = None
while run_time() != asleep:  # until the worker has fallen asleep
    asleep = run_time()
    time.sleep(0.2)
for _ in range(20_000):  # another may have its processor
    nf.layer_norm(x, out=x)
    if run_time() != asleep:
        break
print(run_time() > asleep)
free = False
for _ in range(20_000):
    nf.layer_norm(x, out=x)
    free = os.sched_getaffinity(worker) == os.sched_getaffinity(0)
    if free:
        break
print(free)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the run times of threads from /proc")
def test_a_worker_that_slept_is_woken():
    """And it may then run wherever the process may: only while it sleeps it keeps off its caller's processor."""
    assert _child.output(WORKER + AWAKE, OPENBLAS_NUM_THREADS="1") == "True\nTrue"


MOVED = """
allowed = os.sched_getaffinity(0)
for _ in range(3):
    taken = set()
    while not taken:  # until it has fallen asleep: it then keeps off its caller's processor
        time.sleep(0.01)
        taken = allowed - os.sched_getaffinity(worker)
    os.sched_setaffinity(worker, taken)  # somebody else decides, and leaves it one processor only
    for _ in range(20):
        nf.layer_norm(x, out=x)
        time.sleep(0.002)  # asleep and awake again
    assert os.sched_getaffinity(worker) == taken
    os.sched_setaffinity(worker, allowed)
    nf.layer_norm(x, out=x)
print("kept")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="moves a thread by its number from /proc")
@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: "")(0)) < 2, reason="needs two CPUs")
def test_a_worker_that_somebody_else_has_moved_stays_there():
    """Whoever wakes it gives back only what it has taken itself: `return_` and `leave` look first."""
    assert _child.output(WORKER + MOVED, OPENBLAS_NUM_THREADS="1") == "kept"


def test_the_comparison_notices_one_cell():
    """Negative control: one cell moved to the next number is seen, in every dtype and result."""
    for dtype in DTYPES:
        want = everything(layer((3, 17)), dtype)
        for i in range(len(want)):
            wrong = (*want[:i], nudged(want[i]), *want[i + 1 :])
            with pytest.raises(AssertionError, match=f"result {i}: 1 of"):
                assert_same_bits(wrong, want)


def test_data_order_matters():
    """Negative control: the cases are such that another order of summation does change bits."""
    changed = 0
    for case in (layer((64, 1031)), batch((64, 3, 331)), rms((64, 1031))):
        x = case.x(F32)
        y = case.forward(x, return_stats=True)
        flipped = np.ascontiguousarray(x[..., ::-1])
        z = case.forward(flipped, return_stats=True)
        changed += int((y[2] != z[2]).sum() if y[1] is None else (y[1] != z[1]).sum() + (y[2] != z[2]).sum())
    assert changed > 0


def test_concurrent_callers(threads):
    """Eight Python threads at once, each with its own mixture of norms: every result as if it were alone."""
    cases = [layer((129, 1031)), rms((129, 1031)), group((3, 12, 61, 61), 3), instance((3, 5, 97, 97)),
             batch((5, 12, 47, 47)), batch((2049, 67)), layer((31, 67, 65), axis=1), layer((8, 16))]  # fmt: skip
    threads(2)
    inputs = {case: case.x(F32) for case in cases}
    want = {case: everything(case, F32, inputs[case]) for case in cases}
    gate = threading.Barrier(8)

    def work(seed):
        order = np.random.default_rng(seed).permutation(len(cases) * 3) % len(cases)
        gate.wait()
        for i in order:
            assert_same_bits(everything(cases[i], F32, inputs[cases[i]]), want[cases[i]])

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(work, range(8)))


def test_controls_while_others_call(threads):
    """Changing the threads and the pool while others compute harms nobody."""
    case = layer((513, 1031))
    x, weight, bias = case.x(), case.weight(), case.bias()
    want = case.forward(x, weight, bias)
    stop = threading.Event()

    def turn_the_knobs():
        count = 0
        while not stop.is_set():
            threads(1 + count % 7)
            if count % 3 == 0:
                nf.release_pool()
            count += 1
        return count

    def call():
        for _ in range(60):
            assert_same_bits(case.forward(x, weight, bias), want)

    with ThreadPoolExecutor(4) as executor:
        knobs = executor.submit(turn_the_knobs)
        try:
            list(executor.map(lambda _: call(), range(3)))
        finally:
            stop.set()
        assert knobs.result() > 0


def _other_thread_runs_during(call, *args):
    """Whether a waiting Python thread runs inside the call. Only a released GIL can let it: no switch is forced."""
    interval = sys.getswitchinterval()
    seen = []
    go, ready = threading.Event(), threading.Event()

    def waiter():
        ready.set()
        go.wait()
        seen.append(True)

    thread = threading.Thread(target=waiter)
    thread.start()
    ready.wait()
    try:
        sys.setswitchinterval(1000)
        go.set()
        call(*args)
        during = bool(seen)
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    return during


@pytest.mark.skipif(not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="this Python has no GIL to release")
def test_large_calls_release_the_gil(threads):
    threads(1)  # the library's own threads are not to take the CPU that the other thread needs
    ones = np.ones((65536, 1))
    calls = [
        lambda x: nf.layer_norm(x),
        lambda x: nf.rms_norm(x),
        lambda x: nf.group_norm(x.reshape(-1, 64, 1024), 8),
        lambda x: nf.instance_norm(x.reshape(-1, 64, 1024)),
        lambda x: nf.batch_norm(x.reshape(-1, 64, 1024), training=True),
        lambda x: nf.layer_norm_backward(x, x, ones[: len(x)], ones[: len(x)]),
    ]
    for call in calls:
        # A call of milliseconds may be over before a busy machine gives the other thread a CPU: then a longer one.
        sizes = (data((rows, 2048), F32) for rows in (2048, 2048, 8192, 32768, 65536))
        assert any(_other_thread_runs_during(call, x) for x in sizes)
    # Negative control: work that keeps the GIL lets nobody in.
    assert not any(_other_thread_runs_during(sum, range(200_000)) for _ in range(5))


COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")

LATE = """
import ctypes, os, random, sys, time
from pathlib import Path
import numpy as np
import normfast as nf

late = ctypes.CDLL(sys.argv[1])
late_in = ctypes.c_char_p.in_dll(late, "late_in")
nf.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((64, 4096), dtype=np.float32)
out = np.empty_like(x)
before = set(os.listdir("/proc/self/task"))
for _ in range(50):
    nf.layer_norm(x, out=out)
(worker,) = set(os.listdir("/proc/self/task")) - before

def seconds():
    return int(Path(f"/proc/self/task/{worker}/schedstat").read_text().split()[0]) * 1e-9

# The worker goes to sleep half a millisecond after it had something to do: about then the next call comes, and is late
# for the lock under which it wakes who sleeps.
wait, end, rounds, count = random.Random(0), time.monotonic() + 200, 0, ctypes.c_long.in_dll(late, "late_count")
while rounds < 8 or (count.value == 0 and time.monotonic() < end):
    rounds += 1
    late_in.value = b"_core"
    for _ in range(500):
        nf.layer_norm(x, out=out)
        until = time.perf_counter() + wait.uniform(400e-6, 560e-6)
        while time.perf_counter() < until:
            pass
    late_in.value = None
    start, deadline = seconds(), time.monotonic() + 20  # others may have the CPUs
    while seconds() - start < 1e-3:
        assert time.monotonic() < deadline, f"the worker sleeps, round {rounds}"
        for _ in range(500):
            nf.layer_norm(x, out=out)
print(count.value)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="reads Linux's count of a thread's CPU time")
@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
@pytest.mark.skipif("lib" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers have a lock of their own")
def test_a_late_caller_loses_no_worker(tmp_path):
    """A caller that was held up just before it woke a worker, which meanwhile did the work and went to sleep again,
    took it for awake ever after, and worked alone from then on."""
    library = tmp_path / "late.so"
    command = [COMPILER, "-std=gnu11", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-o", library]
    subprocess.run([*command, Path(__file__).parent / "faults" / "late.c", "-ldl"], check=True)
    assert int(_child.output(LATE, library, LD_PRELOAD=str(library), timeout=600)) > 0
