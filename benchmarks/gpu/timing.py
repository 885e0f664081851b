# SPDX-License-Identifier: BSD-3-Clause

"""Timing on a GPU: medians over batches of calls, between two events on the stream.

The device is kept busy while the host enqueues a batch, so that the calls follow each other without gaps whatever the
host needs for each: what is measured is the work on the device. What the host needs is measured apart, in `overhead`.
Contenders take turns, round by round.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from statistics import median
from time import perf_counter
from typing import Any

import torch

BATCH = 2.5e-3  # seconds of work on the device per sample, at least
FEWEST, MOST = 4, 60  # calls per sample; more could fill the queue of launches
CYCLES = 2.0e9  # per second, for how long the device is kept busy; too long does no harm


@dataclass
class Contender:
    name: str
    call: Callable[[int], Any]  # on set i
    wait: Callable[[Any], None] | None = None  # not on the stream of PyTorch: wait for a result, and use the wall clock
    calls: int = FEWEST
    hold: float = 0.0  # seconds for which the device is kept busy before a sample
    seconds: list[float] = field(default_factory=list)
    launching: float = 0.0  # seconds that the host needs per call

    def summary(self) -> dict:
        values = sorted(self.seconds)
        middle = median(values)
        quarter = len(values) // 4
        return {
            "us": 1e6 * middle,
            "fastest_us": 1e6 * values[0],
            "spread": (values[-1 - quarter] - values[quarter]) / middle,
            "samples": len(values),
            "calls": self.calls,
            "host_us": round(1e6 * self.launching, 2),
            "clock": "wall" if self.wait else "events",
        }


class Timer:
    """Samples of contenders over `sets` rotating sets of arrays. On the host ("cpu") only to try the board."""

    def __init__(self, sets: int, device: str) -> None:
        self.sets, self.device = sets, device
        self.ring: list[Any] = [None] * sets  # results stay alive for a turn, or they would share one place in memory
        self.at = 0

    def sample(self, one: Contender, calls: int) -> float:
        """Seconds per call."""
        if one.wait or self.device == "cpu":
            return self._by_the_wall(one, calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if one.hold:
            torch.cuda._sleep(int(one.hold * CYCLES))
        start.record()
        began = perf_counter()
        self._run(one, calls)
        one.launching = (perf_counter() - began) / calls
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / calls

    def _run(self, one: Contender, calls: int) -> None:
        for _ in range(calls):
            i = self.at = (self.at + 1) % self.sets
            self.ring[i] = one.call(i)

    def _by_the_wall(self, one: Contender, calls: int) -> float:
        began = perf_counter()
        self._run(one, calls)
        if one.wait:
            one.wait(self.ring[self.at])
        return (perf_counter() - began) / calls

    def calibrate(self, one: Contender) -> None:
        for _ in range(3):  # loads kernels, fills the caching allocator
            self._run(one, min(self.sets, 3))
        self.finish(one)
        taken = self.sample(one, FEWEST)
        one.calls = max(FEWEST, min(MOST, ceil(BATCH / max(taken, 1e-7))))
        taken = self.sample(one, one.calls)
        # If the host is slower than the device, the device has to wait for all of the batch, else only for the first.
        late = 1.2 * one.launching * (one.calls if one.launching > 0.5 * taken else 4)
        one.hold = min(0.02, late + 5e-5)

    def finish(self, one: Contender) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
        if one.wait:
            one.wait(self.ring[self.at])

    def measure(self, contenders: list[Contender], rounds: int, budget: float) -> None:
        """`rounds` samples of each; rounds end when the seconds of the budget are spent, but not before five."""
        gc.collect()
        gc.disable()
        try:
            for one in contenders:
                self.calibrate(one)
            began = perf_counter()
            for number in range(rounds):
                if number >= 5 and perf_counter() - began > budget:
                    break
                shift = number % len(contenders)
                for one in contenders[shift:] + contenders[:shift]:
                    one.seconds.append(self.sample(one, one.calls))
        finally:
            gc.enable()
            self.ring = [None] * self.sets
