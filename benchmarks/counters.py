"""What the kernel counted while we measured: waiting for a CPU, page faults."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from time import perf_counter, process_time


@dataclass(frozen=True)
class Counts:
    waited: float | None  # seconds that threads of this process were runnable but had no CPU; None: not counted here
    faults: int

    def __sub__(self, other: Counts) -> Counts:
        waited = None if self.waited is None or other.waited is None else self.waited - other.waited
        return Counts(waited, self.faults - other.faults)


class Neighbours:
    """How many CPUs the rest of the machine has used since this was made; None where Linux does not say."""

    def __init__(self) -> None:
        self._start = (_busy(), process_time(), perf_counter())

    def cpus(self) -> float | None:
        busy, own, now = (_busy(), process_time(), perf_counter())
        if busy is None or self._start[0] is None:
            return None
        others = busy - self._start[0] - (own - self._start[1])
        return max(0.0, others / (now - self._start[2]))


def _busy() -> float | None:
    """Seconds of CPU time that the machine has spent on anything, or that a hypervisor has withheld."""
    try:
        with open("/proc/stat") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, interrupts, soft, stolen = fields
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


class Counters:
    """Reads the counters of this process. The files of Linux's scheduler stay open: opening costs more than reading."""

    _TASKS = "/proc/self/task"

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self.counts_waiting = os.path.exists("/proc/self/schedstat")

    def read(self) -> Counts:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        waited = self._waited() if self.counts_waiting else None
        return Counts(waited, usage.ru_minflt + usage.ru_majflt)

    def _waited(self) -> float:
        tasks = os.listdir(self._TASKS)
        total = 0
        for task in tasks:
            try:
                if task not in self._files:
                    self._files[task] = os.open(f"{self._TASKS}/{task}/schedstat", os.O_RDONLY)
                # Three numbers: nanoseconds on a CPU, nanoseconds waiting for one, times it got one.
                total += int(os.pread(self._files[task], 96, 0).split()[1])
            except (OSError, IndexError):  # the thread has ended
                file = self._files.pop(task, None)
                if file is not None:
                    os.close(file)
        return total * 1e-9
