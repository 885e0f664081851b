"""How the board takes its samples, on a clock that the contender sets: nothing is timed here."""

import pytest
from benchmarks.measure import SHORTEST, SLOW, WARM, calibrate, measure


class Fake:
    """Its first calls take longer than the others, as until the caches hold its data."""

    hands_over = False

    def __init__(self, cold, seconds, cold_calls):
        self.cold, self.seconds, self.cold_calls = cold, seconds, cold_calls
        self.samples = []

    def sample(self, n):
        cold = max(0, min(n, self.cold_calls - sum(self.samples)))
        self.samples.append(n)
        return cold * self.cold + (n - cold) * self.seconds


@pytest.mark.parametrize("cold_calls", [0, 1, 2, 3, 4])
def test_calls_that_start_slow_are_calibrated_as_they_go_on(cold_calls):
    """Two calls of 150 us were one sample, and five of 45 us that of the next contender, which had a warmer cache."""
    calls, seconds = calibrate(Fake(150e-6, 45e-6, cold_calls))
    assert calls * 45e-6 >= SHORTEST
    assert seconds == pytest.approx(45e-6)


def test_slow_calls_are_sampled_one_by_one():
    assert calibrate(Fake(0, SHORTEST, 0))[0] == 1
    slow = Fake(0, SLOW, 0)
    assert calibrate(slow) == (1, SLOW)
    assert slow.samples == [1]


def test_calls_too_short_to_time():
    calls, seconds = calibrate(Fake(0, 1e-8, 0))
    assert calls * seconds >= SHORTEST


@pytest.mark.parametrize("each", [1e-6, 45e-6, 0.3e-3, WARM])
def test_every_sample_is_warm(each):
    """With one thread, too: two boards that warm up differently show two libraries that are not the same."""
    fake = Fake(0, each, 0)
    series = measure({"normfast": fake}, threads=1, rounds=5, budget=0)["normfast"]
    one = fake.samples[-3:] if each < WARM else [fake.samples[-2], 0, fake.samples[-1]]
    assert one[0] == 1
    assert (one[0] + one[1]) * each >= WARM
    assert one[2] == series.calls
    assert len(series.seconds) == 5
