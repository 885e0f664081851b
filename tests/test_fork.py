"""Promise 6: every function works in a child after `os.fork`, whatever the parent was doing."""

from __future__ import annotations

import os

import pytest

import _child

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no os.fork")

# Python itself warns of a fork beside threads; here it is the point.
HEAD = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import numpy as np
import normfast as nf
from _cases import batch, layer
from _checks import same_bits
from _child import ended, forked
CASES = [layer((1031, 1031)), batch((7, 19, 89, 87))]
nf.set_num_threads(3)

def everything():
    results = []
    for case in CASES:
        x, dy, weight, bias = case.x(), case.dy(), case.weight(), case.bias()
        y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
        results += [y, mean, rstd, *case.backward(dy, x, mean, rstd, weight)]
    return results

def right(results):
    return all(same_bits(a, b) for a, b in zip(results, want, strict=True))
"""


def test_after_use():
    """The parent's threads and pool are warm; child and parent both go on."""
    code = """
want = everything()
for _ in range(5):
    everything()
    assert ended(forked(lambda: right(everything()))) == 0
    assert right(everything())
"""
    _child.output(HEAD + code)


def test_before_first_use():
    code = """
def work():
    global want
    want = everything()
    return right(everything())
assert ended(forked(work)) == 0
want = everything()
assert right(everything())
"""
    _child.output(HEAD + code)


def test_grandchildren():
    code = """
want = everything()
def work():
    return right(everything()) and ended(forked(lambda: right(everything()))) == 0 and right(everything())
assert ended(forked(work)) == 0
"""
    _child.output(HEAD + code)


@pytest.mark.slow
def test_while_other_threads_compute():
    """A fork in the middle of somebody's call: the lock it holds, the job it began, are not there in the child."""
    code = """
want = everything()
stop = threading.Event()
faults = []
def busy():
    while not stop.is_set():
        if not right(everything()):
            faults.append(1)
threads = [threading.Thread(target=busy) for _ in range(3)]
for t in threads:
    t.start()
for _ in range(12):
    assert ended(forked(lambda: right(everything()))) == 0
stop.set()
for t in threads:
    t.join()
assert not faults
"""
    _child.output(HEAD + code)


def test_controls_and_pool_in_the_child():
    """Results of the parent stay readable in the child, whose controls are its own."""
    code = """
want = everything()
kept = want[0]
def work():
    nf.set_num_threads(2)
    nf.release_pool()
    nf.set_pool_limit(0)
    ok = right(everything()) and same_bits(kept, want[0])
    del globals()["kept"]
    return ok and nf.get_num_threads() == 2
assert ended(forked(work)) == 0
assert nf.get_num_threads() == 3
assert nf.show_config("dicts")["pool"]["limit"] > 0
assert right(everything())
"""
    _child.output(HEAD + code)


def test_threads_in_the_child():
    """Several Python threads call at once in the child."""
    code = """
want = everything()
def work():
    results = []
    threads = [threading.Thread(target=lambda: results.append(right(everything()))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results == [True] * 4
assert ended(forked(work)) == 0
"""
    _child.output(HEAD + code)


def test_multiprocessing():
    """A pool of forked workers, as data loaders use them."""
    code = """
import multiprocessing
def norm(seed):
    x = np.random.default_rng(seed).standard_normal((513, 1031)).astype(np.float32)
    return float(nf.layer_norm(x).astype(np.float64).__abs__().sum())
want = [norm(seed) for seed in range(8)]
with multiprocessing.get_context("fork").Pool(3) as workers:
    assert workers.map_async(norm, range(8)).get(60) == want
"""
    _child.output(HEAD + code)


def test_the_harness_notices_a_hang_and_an_error():
    """Negative control."""
    code = """
want = everything()
assert ended(forked(lambda: time.sleep(60)), seconds=1) == "hangs"
assert ended(forked(lambda: False)) == 2
want[0][0, 0] += 1
assert ended(forked(lambda: right(everything()))) == 2
"""
    _child.output(HEAD + code)
