"""What `test_process.py` lets happen, each in a process of its own: signals, an exit, forks, other processes."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np

import normfast as nf
from _cases import batch, group, layer
from _checks import F32, bits, same_bits
from _child import ended, forked

# Large enough that every call releases the GIL and is shared among threads.
CASES = [layer((1031, 1031)), group((5, 24, 93, 91), 6), batch((7, 19, 89, 87))]


class Work:
    """Calls of several norms, and what they gave when nothing else went on."""

    def __init__(self, count=3):
        self.inputs = [(case, case.x(F32), case.dy(F32), case.weight(F32), case.bias(F32)) for case in CASES]
        nf.set_num_threads(count)
        self.want = self.everything()

    def everything(self):
        results = []
        for case, x, dy, weight, bias in self.inputs:
            y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
            results += [y, mean, rstd, *case.backward(dy, x, mean, rstd, weight)]
        return results

    def right(self):
        return all(same_bits(a, b) for a, b in zip(self.everything(), self.want, strict=True))

    def busy(self, count):
        """Starts threads that compute until `stop` is called, which says how often they did, all of it right."""
        stopped = threading.Event()
        done = []

        def compute():
            rounds = 0
            while not stopped.is_set() or rounds == 0:
                if not self.right():
                    return
                rounds += 1
            done.append(rounds)

        threads = [threading.Thread(target=compute, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()

        def stop():
            stopped.set()
            for thread in threads:
                thread.join()
            assert len(done) == count, "a thread got other bits"
            return sum(done)

        return stop


# ---- signals


def signals(deliveries):
    """To the process by a timer, to the caller, and to each thread of the pool; the handler calls the library too."""
    work = Work()
    seen = dict.fromkeys((signal.SIGALRM, signal.SIGUSR1), 0)
    wrong = []
    inside = False

    def handler(number, _):
        nonlocal inside
        seen[number] += 1
        if seen[number] % 20 == 0 and not inside:
            inside = True  # a handler is interrupted by signals too
            if not work.right():
                wrong.append(number)
            inside = False

    for number in seen:
        signal.signal(number, handler)
    tgkill = ctypes.CDLL(None, use_errno=True).tgkill
    stopped = threading.Event()

    def shoot():
        own = threading.get_native_id()
        while not stopped.is_set():
            for thread in os.listdir("/proc/self/task"):
                if int(thread) != own:
                    tgkill(os.getpid(), int(thread), signal.SIGUSR1)
            time.sleep(0.002)

    shooter = threading.Thread(target=shoot)
    shooter.start()
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    calls = 0
    while min(seen.values()) < int(deliveries):
        assert work.right()
        calls += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    stopped.set()
    shooter.join()
    assert not wrong
    assert work.right()
    print(calls, *seen.values())


def interrupt(times):
    """Ctrl-C while a call writes to three arrays: when KeyboardInterrupt comes it has written all of them or none."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    nf.set_num_threads(2)
    x = np.resize(layer((64, 2048)).x(F32), (4096, 64, 32))
    out, mean, var = np.empty_like(x), np.empty(64), np.empty(64)

    def restart():
        out.fill(7)
        mean.fill(0)
        var.fill(1)

    def call():
        nf.batch_norm(x, mean, var, training=True, out=out)

    def state():
        return bits(out), bits(mean), bits(var)

    def interrupter(delay):
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    restart()
    nothing = state()
    call()
    everything = state()
    assert nothing != everything
    inside = 0
    for i in range(int(times)):
        restart()
        thread = threading.Thread(target=interrupter, args=(0.001 * (i % 10),))
        returned = False
        try:
            thread.start()
            call()
            returned = True
            thread.join()
            for _ in range(1000):  # not one long sleep: a signal may come just before it
                time.sleep(0.1)
            raise AssertionError("the interrupt never came")
        except KeyboardInterrupt:
            pass
        thread.join()
        assert state() in (nothing, everything)
        inside += not returned and state() == everything
    restart()
    call()
    assert state() == everything
    print(inside)


# ---- the end of the interpreter


class Slow:
    """Dies when the interpreter does, slowly: other threads come back from their calls meanwhile."""

    def __del__(self):
        time.sleep(0.1)


def leave(how):
    """Ends while daemon threads are inside calls, the pool is at work and results are alive."""
    work = Work()
    globals()["kept"] = [Slow(), *work.everything()]

    def compute():
        while True:
            work.everything()

    threads = [threading.Thread(target=compute, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    if how == "atexit":
        atexit.register(lambda: print("right" if work.right() else "wrong", flush=True))
    elif how == "atexit with other threads":

        def last():
            nf.release_pool()
            nf.set_num_threads(7)
            print("right" if work.right() else "wrong", flush=True)

        atexit.register(last)
    time.sleep(0.05)
    if how == "exit status":
        sys.exit(3)
    if how == "an error":
        raise RuntimeError("on purpose")


# ---- forks, and other processes


def forks(times):
    """At any moment of four threads, by a fifth; child and grandchild compute with any number of threads."""
    warnings.simplefilter("ignore", DeprecationWarning)  # Python's own warning of forks beside threads
    work = Work()
    stop = work.busy(4)
    r = random.Random(0)
    statuses = []

    def all_counts():
        for count in (1, 2, 3, 7):
            nf.set_num_threads(count)
            if not work.right():
                return False
        return True

    def family():
        return all_counts() and ended(forked(all_counts), seconds=300) == 0

    def fork():
        for _ in range(int(times)):
            time.sleep(r.random() * 0.02)
            statuses.append(ended(forked(family), seconds=600))

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    print(stop(), *statuses)


def spawns(times):
    """Programs are started, by vfork where the system has it, while three threads compute."""
    work = Work()
    stop = work.busy(3)
    for _ in range(int(times)):
        pid = os.posix_spawn("/bin/true", ["true"], os.environ)
        assert ended(pid, seconds=600) == 0
        assert subprocess.run(["/bin/echo", "right"], capture_output=True, check=True).stdout == b"right\n"
    print(stop())


def digests(count):
    nf.set_num_threads(count)
    return [None if a is None else bits(a) for a in Work(count).want]


def workers(method):
    """Worker processes as data loaders have them, made while threads of this one compute."""
    work = Work()
    stop = work.busy(2)
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map_async(digests, (1, 2, 3, 7)).get(1000)
    stop()
    want = [None if a is None else bits(a) for a in work.want]
    assert all(result == want for result in found)


# ---- results


def handed_over(rounds):
    """One thread computes, another looks at the results and frees them, while the first goes on in recycled memory."""
    work = Work()
    nf.set_pool_limit(8 << 20)
    results = queue.Queue(maxsize=3)
    seen = []

    def take():
        while (made := results.get()) is not None:
            seen.append(all(same_bits(a, b) for a, b in zip(made, work.want, strict=True)))
            del made

    takers = [threading.Thread(target=take) for _ in range(2)]
    for taker in takers:
        taker.start()
    for _ in range(int(rounds)):
        results.put(work.everything())
    for _ in takers:
        results.put(None)
    for taker in takers:
        taker.join()
    assert seen == [True] * int(rounds)
    assert nf.show_config("dicts")["pool"]["held"] <= 8 << 20


# ---- interpreters

IN_ANOTHER = """
import sys, warnings
warnings.simplefilter("ignore")  # NumPy's, of sub-interpreters
sys.path[:0] = {path!r}
try:
    import normfast as nf
except ImportError as error:
    said = "ImportError"
else:
    import numpy as np
    said = nf.layer_norm(np.arange(3.0)).tolist()
open({file!r}, "w").write(str(said))
"""


def interpreters(first, file):
    """A sub-interpreter imports the library, after the main one has or before."""
    import _xxsubinterpreters as subinterpreters

    work = Work() if first == "main" else None
    another = subinterpreters.create()
    subinterpreters.run_string(another, IN_ANOTHER.format(path=sys.path, file=file))
    subinterpreters.destroy(another)
    work = work or Work()
    assert work.right()
    try:
        nf.layer_norm(np.ones((2, 3)), np.ones(4))
    except ValueError as error:
        print(error)
