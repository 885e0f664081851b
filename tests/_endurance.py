"""Hours in the life of a server: what `test_endurance.py` lets happen all at once, in a process of its own.

Eight threads make random calls and check samples of their results against bits computed alone. The main thread is one
of them and is interrupted by signals as it computes. Another thread meanwhile forks, changes the number of threads, and
empties and limits the pool. At intervals all stand still, the pool is emptied, and memory, threads and file descriptors
are counted.

    python tests/_endurance.py SECONDS SEED PATIENCE [FAULTS]

prints a line per interval and a last one in JSON. A hang, PATIENCE seconds without progress, ends the process with a
traceback of every thread. FAULTS breaks things on purpose, separated by commas: see FAULTS.
"""

from __future__ import annotations

import collections
import ctypes
import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import time
import warnings
import zlib

import numpy as np

import normfast as nf
from _cases import batch, group, instance, layer, rms
from _checks import DTYPES, F32, nudged
from _child import ended, forked

MB = 1 << 20
LIBC = ctypes.CDLL(None)
CALLERS = 8
COUNTS = (1, 2, 3, 7, 16)
POOL_LIMITS = (0, 8 * MB, 64 * MB)
INTERVALS = 24
FRACTIONS = ("minute", "MB", "MB still")
GROWTH = 2  # MB that the process may grow by, from the second third of the time to the last; 0.1 was seen

# What a broken library or a broken caller would do: each ends the run with a complaint and an exit status other than 0.
FAULTS = ("leak", "bit", "child", "hang", "descriptor", "thread")

CASES = [
    layer((3, 17)), layer((37, 67)), layer((513, 1031)), layer((61, 31, 129), axis=1), layer((4001, 53), axis=0),
    layer((2, 140_007)), layer((37, 129, 67), axis=(0, 2)), layer((31, 129, 65), permutation=(2, 1, 0)), rms((8, 16)),
    rms((1025, 515)), rms((4001, 53), axis=0), group((3, 12, 61, 61), 3), group((3, 61, 61, 12), 3, channel_axis=-1),
    instance((3, 5, 97, 97)), instance((3, 97, 97, 5), channel_axis=-1), batch((5, 12, 47, 47)), batch((2049, 67)),
    batch((5, 47, 47, 12), channel_axis=-1), batch((5, 12, 47, 47), training=False), batch((6, 11, 5, 7)),
]  # fmt: skip


def digest(results):
    return tuple(None if a is None else zlib.crc32(np.ascontiguousarray(a).view(np.uint8)) for a in results)


def digests_of_inputs(jobs):
    return [digest(job.inputs) for job in jobs]


class Job:
    """One case in one dtype: its arrays, its calls, and the digests of their results computed by one thread, alone."""

    def __init__(self, case, dtype):
        self.case = case
        x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
        running = case.running(F32) or ()
        _, mean, rstd = self._forward(case, x, weight, bias, running)[:3]
        self.inputs = (x, dy, weight, bias, mean, rstd, *running)
        self.calls = {
            "forward": lambda: self._forward(case, x, weight, bias, running),
            "in place": lambda: self._forward(case, x, weight, bias, running, out=x.copy("K")),
            "backward": lambda: case.backward(dy, x, mean, rstd, weight),
            "backward in place": lambda: self._over(case, dy.copy("K"), x, mean, rstd),
            "refused": lambda: self._refused(case, x),
        }
        self.want = {name: digest(call()) for name, call in self.calls.items()}

    @staticmethod
    def _forward(case, x, weight, bias, running, **kw):
        running = tuple(a.copy() for a in running)
        if "out" in kw:
            kw["out"] = x = kw["out"]
        result = case.forward(x, weight, bias, return_stats=True, **({"running": running} if running else {}), **kw)
        return (*result, *running)

    @staticmethod
    def _over(case, dy, x, mean, rstd):
        return case.backward(dy, x, mean, rstd, needs=("x",), out=dy)

    @staticmethod
    def _refused(case, x):
        """An error, with its message and its traceback, leaks nothing either."""
        try:
            case.forward(x, np.ones((2, 2, 2, 2)))
        except ValueError:
            return ()
        raise AssertionError("a weight of the wrong shape was taken")


class Run:
    def __init__(self, seconds, seed, patience, faults):
        self.seconds, self.seed, self.patience, self.faults = seconds, seed, patience, faults
        nf.set_num_threads(1)
        self.jobs = [Job(case, dtype) for case in CASES for dtype in DTYPES]
        self.before = digests_of_inputs(self.jobs)
        nf.set_num_threads(max(COUNTS))
        large = np.ones((1 << 20, 4), F32)
        nf.layer_norm(large)  # all threads that there will be
        self.counts = collections.Counter()  # every name has one thread that counts it
        self.called = [0] * CALLERS
        self.checked = [0] * CALLERS
        self.wrong = []
        self.kept = collections.deque(maxlen=2 * CALLERS)  # results live on, and die in other threads than their own
        self.leaked = []
        self.found = []  # what each interval measured
        self.turns = 0  # of the conductor
        self.fed = [-1] * (CALLERS + 1)
        self.stop = False
        self.pause = threading.Event()
        self.barrier = threading.Barrier(CALLERS + 2)  # with the conductor, and with whoever counts
        self.inside = False

    # ------------------------------------------------------------ the callers

    def call(self, me, rng):
        job = self.jobs[rng.integers(len(self.jobs))]
        name = list(job.calls)[rng.choice(5, p=(0.35, 0.15, 0.3, 0.15, 0.05))]
        results = job.calls[name]()
        self.called[me] += 1
        if rng.random() < 0.25:
            if "bit" in self.faults and name == "forward" and not self.wrong:
                results = (nudged(results[0]), *results[1:])
            if digest(results) != job.want[name]:
                self.wrong.append(f"{job.case}-{job.inputs[0].dtype} {name}")
            self.checked[me] += 1
        if rng.random() < 0.1:
            self.kept.append(results)

    def caller(self, me):
        rng = np.random.default_rng((self.seed, me))
        while not self.stop:
            if self.pause.is_set():
                self.stand_still()
            if me == 0:
                self.interruptible_call(rng)
            else:
                self.call(me, rng)
            if "hang" in self.faults and me == 3:
                threading.Event().wait()

    def interruptible_call(self, rng):
        """A KeyboardInterrupt ends what the main thread does with a call, never the call in the middle."""
        try:
            self.inside = True
            self.call(0, rng)
            self.inside = False
        except KeyboardInterrupt:
            self.counts["interrupts"] += 1

    def on_interrupt(self, *_):
        self.counts["SIGINT"] += 1
        if self.inside:
            self.inside = False
            raise KeyboardInterrupt

    def on_alarm(self, *_):
        """Runs in the main thread, before or after a call or between its lines in Python; and calls as well."""
        self.counts["SIGALRM"] += 1
        if self.counts["SIGALRM"] % 16 == 0 and not self.pause.is_set():
            job = self.jobs[self.counts["SIGALRM"] // 16 % len(self.jobs)]
            if digest(job.calls["forward"]()) != job.want["forward"]:
                self.wrong.append(f"{job.case} in a signal handler")

    # ------------------------------------------------------------ the conductor

    def conduct(self):
        rng = np.random.default_rng((self.seed, CALLERS))
        while not self.stop:
            if self.pause.is_set():
                self.stand_still()
            self.turns += 1
            # Everything once, then at random.
            what = self.turns - 1 if self.turns <= 5 else rng.choice(5, p=(0.3, 0.4, 0.1, 0.05, 0.15))
            if what == 0:
                nf.set_num_threads(int(rng.choice(COUNTS)))
                self.counts["thread counts"] += 1
            elif what == 1:
                seen = self.counts["SIGINT"]
                os.kill(os.getpid(), signal.SIGINT)
                while self.counts["SIGINT"] == seen and not self.pause.is_set():
                    time.sleep(0.001)
            elif what == 2:
                nf.set_pool_limit(int(rng.choice(POOL_LIMITS)))
                self.counts["pool limits"] += 1
            elif what == 3:
                nf.release_pool()
                self.counts["pool releases"] += 1
            else:
                self.fork(int(rng.integers(1 << 30)))
            time.sleep(float(rng.random()) * 0.03)

    def fork(self, seed):
        """The child computes with other numbers of threads than its parent; every third has a child of its own."""
        status = ended(forked(lambda: self.in_child(seed, depth=0)), self.patience)
        if status == "hangs":
            self.wrong.append("a child hangs")
            return
        self.counts["forks"] += 1
        if status != 0:
            self.wrong.append(f"a child ended with {status}")

    def in_child(self, seed, depth):
        rng = np.random.default_rng(seed)
        for count in rng.permutation(COUNTS)[:3]:
            nf.set_num_threads(int(count))
            job = self.jobs[rng.integers(len(self.jobs))]
            for name in ("forward", "backward"):
                if digest(job.calls[name]()) != job.want[name]:
                    return False
        if "child" in self.faults and self.counts["forks"] == 0:
            return False
        if depth == 0 and seed % 3 == 0:
            return ended(forked(lambda: self.in_child(seed + 1, depth=1)), self.patience) == 0
        return True

    # ------------------------------------------------------------ counting

    def stand_still(self):
        self.barrier.wait()  # all have come
        self.barrier.wait()  # all may go

    def measure(self):
        """While nobody calls, with an empty pool: what is there then is held by somebody."""
        busy = resident()
        self.pause.set()
        self.barrier.wait()
        self.kept.clear()
        gc.collect()
        nf.release_pool()
        if hasattr(LIBC, "malloc_trim"):
            LIBC.malloc_trim(0)
        found = {
            "calls": sum(self.called),
            "checked": sum(self.checked),
            **{what: self.counts[what] for what in ("forks", "interrupts", "SIGALRM")},
            "MB": busy / MB,
            "MB still": resident() / MB,
            "threads": len(os.listdir("/proc/self/task")),
            "descriptors": len(os.listdir("/proc/self/fd")),
        }
        self.pause.clear()
        self.barrier.wait()
        return found

    def feed(self):
        """Puts the watchdog off if everybody has done something since; it waits outside Python and needs no GIL."""
        now = [*self.called, self.turns]
        if all(a != b for a, b in zip(now, self.fed, strict=True)):
            self.fed = now
            faulthandler.dump_traceback_later(self.patience, exit=True)

    def watch(self):
        start = time.monotonic()
        for i in range(1, INTERVALS + 1):
            while time.monotonic() < start + self.seconds * i / INTERVALS:
                time.sleep(min(1, self.seconds / INTERVALS))
                self.feed()
            found = {"minute": (time.monotonic() - start) / 60, **self.measure()}
            last = self.found[-1] if self.found else {"minute": 0, "calls": 0}
            found["per minute"] = (found["calls"] - last["calls"]) // (found["minute"] - last["minute"])
            if i == 1:
                print(*(f"{name:>11}" for name in found))
            print(*(f"{value:11.{2 if name in FRACTIONS else 0}f}" for name, value in found.items()), flush=True)
            self.found.append(found)
            if "leak" in self.faults:
                self.leaked.append(np.ones(MB // 16))
            if "descriptor" in self.faults:
                os.open(os.devnull, os.O_RDONLY)
            if "thread" in self.faults:
                threading.Thread(target=threading.Event().wait, daemon=True).start()
        self.stop = True

    # ------------------------------------------------------------ from outside

    def run(self):
        threading.excepthook = failed
        signal.signal(signal.SIGINT, self.on_interrupt)
        signal.signal(signal.SIGALRM, self.on_alarm)
        targets = [lambda me=me: self.caller(me) for me in range(1, CALLERS)] + [self.conduct, self.watch]
        threads = [threading.Thread(target=target, daemon=True) for target in targets]
        faulthandler.dump_traceback_later(self.patience, exit=True)
        for thread in threads:
            thread.start()
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        self.caller(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for thread in threads:
            thread.join()
        faulthandler.cancel_dump_traceback_later()

    def complaints(self):
        """What is wrong with what was seen; the first third of the time is left out where things have to be flat."""
        found = self.found[INTERVALS // 3 :]
        late = len(found) // 2
        growth = np.median([f["MB still"] for f in found[late:]]) - np.median([f["MB still"] for f in found[:late]])
        if growth > GROWTH:
            yield f"memory grew by {growth:.1f} MB"
        for what in ("threads", "descriptors"):
            # The least of each part: a thread that has just ended may still be listed.
            if min(f[what] for f in found[late:]) > min(f[what] for f in found[:late]):
                yield f"{what}: {[f[what] for f in found]}"
        if digests_of_inputs(self.jobs) != self.before:
            yield "an input was written to"
        for what in ("forks", "interrupts", "SIGALRM", "thread counts", "pool limits", "pool releases"):
            if self.counts[what] == 0:
                yield f"{what}: none"
        for i in range(CALLERS):
            if self.checked[i] == 0:
                yield f"caller {i} has checked nothing"
        yield from self.wrong[:9]


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def failed(arguments):
    """An exception in a thread ends the run at once: the others would wait for that thread."""
    threading.__excepthook__(arguments)
    sys.stderr.flush()
    os._exit(1)


def main(seconds, seed, patience, faults=""):
    faults = set(faults.split(",")) - {""}
    assert faults <= set(FAULTS)
    faulthandler.enable()
    warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of a fork beside threads; here it is the point
    run = Run(float(seconds), int(seed), float(patience), faults)
    run.run()
    print(json.dumps({**run.found[-1], **run.counts, "jobs": len(run.jobs)}))
    complaints = list(run.complaints())
    print(*complaints, sep="\n", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
