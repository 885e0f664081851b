"""Promise 6 for as long as one likes: threads, forks, signals and changes of the controls at once, for an hour.

`_endurance.py` is the process that this happens in. It must end by itself, having found no wrong bit; its memory,
threads and file descriptors must stay as many as they were. How many calls it gets done is printed, never asserted.
"""

from __future__ import annotations

import os
import sys

import pytest

import _child

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in /proc")]

CODE = "import sys, _endurance; sys.exit(_endurance.main(*sys.argv[1:]))"
PATIENCE = 300  # seconds in which some thread gets nothing done: only a hang takes as long


def endure(seconds, *faults, patience=PATIENCE):
    arguments = (seconds, 0, patience, ",".join(faults))
    # NumPy's own threads are not what is counted here, nor what malloc keeps for each thread: 4 to 9 MB more.
    alone = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = _child.spawn(CODE, *arguments, timeout=2 * seconds + 4 * patience, **alone)
    print(done.stdout)
    print(done.stderr)
    return done


def test_some_seconds():
    """The same as below, on every push."""
    assert endure(12).returncode == 0


@pytest.mark.proof
def test_an_hour():
    assert endure(60 * float(os.environ.get("NORMFAST_ENDURANCE_MINUTES", "60"))).returncode == 0


def test_faults_are_noticed():
    """Negative control: a wrong bit in one result that is sampled, a child that fails, and three kinds of leaks."""
    done = endure(3, "bit", "child", "leak", "descriptor", "thread")
    assert done.returncode == 1
    for complaint in (" forward\n", "a child ended with 2\n", "memory grew by ", "descriptors: ", "threads: "):
        assert complaint in done.stderr


def test_a_hang_is_noticed():
    """Negative control: one caller of eight waits for ever."""
    done = endure(60, "hang", patience=5)
    assert done.returncode == 1
    assert "Timeout (0:00:05)!" in done.stderr
    assert " in caller" in done.stderr
