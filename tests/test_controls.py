"""Threads, pool and environment: what can be set, what is refused, what a fresh process starts with."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import _child
import normfast as nf


@pytest.mark.parametrize("count", [1, 2, 3, 64, 1024, np.int64(5)])
def test_set_and_get(count, threads):
    """More threads than CPUs may be set."""
    assert threads(count) is None
    assert nf.get_num_threads() == count
    assert type(nf.get_num_threads()) is int
    assert nf.show_config("dicts")["threads"] == count


def test_context(threads):
    threads(3)
    with nf.threads(5):
        assert nf.get_num_threads() == 5
        with nf.threads(1):
            assert nf.get_num_threads() == 1
        assert nf.get_num_threads() == 5
    assert nf.get_num_threads() == 3


def test_context_restores_after_an_exception(threads):
    threads(3)
    with pytest.raises(KeyError), nf.threads(2):
        raise KeyError
    assert nf.get_num_threads() == 3


@pytest.mark.parametrize(
    ("bad", "error"),
    [(0, ValueError), (-1, ValueError), (1025, ValueError), (10**30, ValueError), (1.5, TypeError), (2.0, TypeError),
     ("2", TypeError), (None, TypeError), ([2], TypeError)],
)  # fmt: skip
def test_bad_counts(bad, error, threads):
    threads(3)
    with pytest.raises(error, match=r"^set_num_threads: n must .*got") as caught:
        nf.set_num_threads(bad)
    assert caught.type is error
    with pytest.raises(error):
        nf.threads(bad)
    assert nf.get_num_threads() == 3


@pytest.mark.parametrize(
    ("bad", "error"),
    [(-1, ValueError), (10**30, ValueError), (-(10**30), ValueError), (1.5, TypeError), ("1", TypeError),
     (None, TypeError)],
)  # fmt: skip
def test_bad_limits(bad, error, pool):
    limit = pool()["limit"]
    with pytest.raises(error, match=r"^set_pool_limit: nbytes must .*got") as caught:
        nf.set_pool_limit(bad)
    assert caught.type is error
    assert pool()["limit"] == limit


def test_pool_limit(pool):
    assert nf.set_pool_limit(12345678) is None
    assert pool()["limit"] == 12345678
    nf.set_pool_limit(np.int64(0))
    assert pool() == {"limit": 0, "held": 0}
    assert nf.release_pool() is None
    assert nf.release_pool() is None


REPORT = (
    "import json, normfast as nf; print(json.dumps([nf.get_num_threads(), nf.show_config('dicts')['pool']['limit']]))"
)


def started_with(**env):
    return json.loads(_child.output(REPORT, **env))


EACH = """
import json, os, sys
import numpy
for environment in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.environ.update(environment)
        import normfast as nf
        print(json.dumps([nf.get_num_threads(), nf.show_config("dicts")["pool"]["limit"]]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no os.fork")
def test_environment_that_makes_no_sense():
    """What is no number counts as not given; of a list the first number counts, and there is a most of threads."""
    threads = ["", "many", "0", "-3", "3x", "3 "]
    limits = ["", "much", "-1", "7000000 bytes", "99999999999999999999999"]
    environments = [
        {"OMP_NUM_THREADS": "5,2,1"},
        {"NORMFAST_NUM_THREADS": "100000"},
        *({"NORMFAST_NUM_THREADS": text, "OMP_NUM_THREADS": "5"} for text in threads),
        *({"NORMFAST_POOL_BYTES": text, "OMP_NUM_THREADS": "5"} for text in limits),
    ]
    found = [json.loads(line) for line in _child.output(EACH, json.dumps(environments)).splitlines()]
    assert [n for n, _ in found] == [5, 1024] + [5] * (len(threads) + len(limits))
    assert len({limit for _, limit in found}) == 1


def test_threads_from_the_environment():
    """NORMFAST_NUM_THREADS, then OMP_NUM_THREADS, then the CPUs allowed."""
    assert started_with(NORMFAST_NUM_THREADS="3", OMP_NUM_THREADS="5")[0] == 3
    assert started_with(OMP_NUM_THREADS="5")[0] == 5
    if hasattr(os, "sched_getaffinity"):
        assert started_with()[0] == len(os.sched_getaffinity(0))
        one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + REPORT
        assert json.loads(_child.output(one))[0] == 1
        assert json.loads(_child.output(one, NORMFAST_NUM_THREADS="4"))[0] == 4


def test_pool_from_the_environment():
    assert started_with(NORMFAST_POOL_BYTES="0")[1] == 0
    assert started_with(NORMFAST_POOL_BYTES="7000000")[1] == 7_000_000
    assert started_with()[1] > 0


def test_config():
    config = nf.show_config("dicts")
    assert list(config) == ["version", "code_path", "code_paths", "threads", "pool", "cuda", "compiler", "numpy"]
    assert config["code_path"] in config["code_paths"]
    assert config["numpy"] == np.__version__
    assert set(config["pool"]) == {"limit", "held"}
    assert config["threads"] == nf.get_num_threads()


def test_config_prints(capsys):
    assert nf.show_config() is None
    printed = capsys.readouterr().out
    assert nf.show_config(mode="stdout") is None
    for key, value in nf.show_config("dicts").items():
        assert key in printed
        if isinstance(value, str):
            assert value in printed
    with pytest.raises(ValueError, match="mode"):
        nf.show_config("json")
    with pytest.raises(TypeError, match="mode"):
        nf.show_config(3)
