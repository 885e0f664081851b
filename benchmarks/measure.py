"""Timing: contenders take turns in one process, round by round; noisy samples are thrown away and counted.

One sample is as many calls as fill `SHORTEST` seconds. `WARM` seconds of calls come before it, in which this
contender's data come into the caches (one call is not enough: the last-level cache does not keep all that it has seen
once, and times were seen to halve until the fifth call) and its threads wake up: some contenders wait for theirs in the
first call, others work without them until they have come. With several threads a pause comes before that, in which the
pools of the contender before go to sleep. The first of these calls is kept by itself, as `first`.
A ratio is the median of the ratios within rounds, so that slow drifts of the machine cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from statistics import median
from time import perf_counter, process_time, sleep
from typing import Protocol

from .counters import Counters

SHORTEST = 2e-4  # seconds per sample, at least
PAUSE = 6e-3  # before each sample when there are several threads, at least
WARM = 1e-3  # of calls before each sample, at least
AT_REST = 0.2  # CPUs in use below which the threads of the contender before count as asleep
WAITED = 0.02  # share of a sample that threads may wait for a CPU before it is rejected
WAITED_BEYOND = 0.10  # where threads are woken, which counts as waiting: what they may wait beyond their usual share
FEWEST = 3  # accepted samples below which a cell counts as noisy
SLOW = 0.15  # seconds per call beyond which a contender takes part in every third round only


class Sampled(Protocol):
    hands_over: bool

    def sample(self, n: int) -> float: ...


@dataclass
class Series:
    """The samples of one contender; a round in which it has no accepted sample is missing from `seconds`."""

    calls: int = 1
    each: float = 0.0  # seconds, at calibration
    slow: bool = False  # takes part in every third round, and needs no call before
    tolerated: float = WAITED
    seconds: dict[int, float] = field(default_factory=dict)  # round -> seconds per call
    rejected: int = 0
    noisy: dict[int, tuple[float, float]] = field(default_factory=dict)  # round -> (share waited, seconds per call)
    first: list[float] = field(default_factory=list)  # seconds of the first call, after the pause if there is one
    faults: list[float] = field(default_factory=list)  # per call
    cpus: list[float] = field(default_factory=list)  # CPU time over time
    waited: list[float] = field(default_factory=list)  # share of the time that threads waited for a CPU

    def settle(self) -> None:
        """Too few quiet samples: take the least disturbed ones, and say so by keeping `noisy`."""
        if len(self.seconds) >= min(FEWEST, len(self.seconds) + len(self.noisy)):
            self.noisy.clear()
            return
        for number, (_, value) in sorted(self.noisy.items(), key=lambda item: item[1][0]):
            if len(self.seconds) >= FEWEST:
                break
            self.seconds.setdefault(number, value)

    def summary(self) -> dict:
        values = sorted(self.seconds.values())
        middle = median(values)
        return {
            "seconds": middle,
            "fastest": values[0],
            **({"first": median(self.first)} if self.first else {}),  # slow contenders have none
            "spread": (_quantile(values, 0.75) - _quantile(values, 0.25)) / middle,
            "samples": len(values),
            "rejected": self.rejected,
            "noisy": bool(self.noisy),
            "calls_per_sample": self.calls,
            "faults_per_call": round(median(self.faults), 2),
            "cpus": round(median(self.cpus), 2),
            "waited": round(median(self.waited), 3),
        }


def _quantile(values: list[float], q: float) -> float:
    at = q * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def calibrate(contender: Sampled) -> tuple[int, float]:
    """Calls per sample, and the seconds that one call takes, both when all is warm."""
    n, taken = 1, contender.sample(1)
    before = 0.0 if taken < SLOW else WARM  # the first call may have been the slowest
    while taken < SHORTEST or before < WARM:
        if taken < SHORTEST:
            n = max(n + 1, ceil(n * min(8.0, 1.2 * SHORTEST / max(taken, 1e-7))))
        taken = contender.sample(n)
        before += taken
    return n, taken / n


def measure(
    contenders: Mapping[str, Sampled],
    threads: int,
    rounds: int,
    budget: float,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Series]:
    """Sample every contender once per round. Rounds end when ``budget`` seconds are spent, but not before five."""
    counters = Counters()
    series: dict[str, Series] = {}
    for name, contender in contenders.items():
        calls, seconds = calibrate(contender)
        series[name] = Series(calls, seconds, seconds > SLOW)
        if threads > 1 or contender.hands_over:
            usual = min(_once(contender, Series(calls, seconds), counters, threads)[0] for _ in range(3))
            series[name].tolerated = usual + WAITED_BEYOND
    names, start = list(contenders), perf_counter()
    for number in range(rounds):
        if number >= 5 and perf_counter() - start > budget:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:  # everyone follows everyone
            if number % 3 == 0 or not series[name].slow:
                _sample(contenders[name], series[name], number, counters, threads)
        tick()
    for one in series.values():
        one.settle()
    return series


def _sample(contender: Sampled, series: Series, number: int, counters: Counters, threads: int) -> None:
    for _ in range(2):  # a rejected sample is tried once more
        share, each = _once(contender, series, counters, threads)
        if share <= series.tolerated:
            series.seconds[number] = each
            return
        series.rejected += 1
        if number not in series.noisy or share < series.noisy[number][0]:
            series.noisy[number] = (share, each)


def _once(contender: Sampled, series: Series, counters: Counters, threads: int) -> tuple[float, float]:
    """One sample: the share of it that threads waited for a CPU, and seconds per call."""
    if threads > 1:
        _rest()
    if not series.slow:
        series.first.append(contender.sample(1))
        if series.each < WARM:
            contender.sample(ceil(WARM / max(series.each, 1e-7)))
    before = counters.read()
    cpu, start = process_time(), perf_counter()
    taken = contender.sample(series.calls)
    elapsed, cpu = perf_counter() - start, process_time() - cpu
    counts = counters.read() - before
    share = 0.0 if counts.waited is None else counts.waited / elapsed
    series.faults.append(counts.faults / series.calls)
    series.cpus.append(cpu / max(elapsed, 1e-9))
    series.waited.append(share)
    return share, taken / series.calls


def _rest() -> None:
    """Sleep until the threads of this process have stopped spinning; some pools do so for tens of milliseconds."""
    sleep(PAUSE)
    for _ in range(40):
        cpu, start = process_time(), perf_counter()
        sleep(PAUSE / 3)
        if process_time() - cpu < AT_REST * (perf_counter() - start):
            return


def paired_ratio(one: Series, other: Series) -> float:
    """How many times longer ``other`` takes than ``one``: the median over the rounds that have both."""
    both = one.seconds.keys() & other.seconds.keys()
    if both:
        return median(other.seconds[r] / one.seconds[r] for r in both)
    return median(other.seconds.values()) / median(one.seconds.values())
