"""Shared fixtures, and the hypothesis profiles: `ci` draws the same examples on every run, `long` draws many."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

import normfast as nf

_common = {"deadline": None, "max_examples": 60, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", **_common)
settings.register_profile("ci", derandomize=True, database=None, **_common)
settings.register_profile("long", **_common | {"max_examples": 5000})
settings.load_profile("ci" if os.environ.get("CI") else os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_report_header():
    config = nf.show_config("dicts")
    return f"normfast {config['version']}: code path {config['code_path']}, {config['threads']} threads"


@pytest.fixture
def threads():
    """`nf.set_num_threads`, undone afterwards."""
    before = nf.get_num_threads()
    yield nf.set_num_threads
    nf.set_num_threads(before)


@pytest.fixture
def pool():
    """The state of the pool; emptied before and after, with a limit of 256 MB in between."""
    before = nf.show_config("dicts")["pool"]["limit"]
    nf.release_pool()
    nf.set_pool_limit(256 << 20)
    yield lambda: nf.show_config("dicts")["pool"]
    nf.set_pool_limit(before)
    nf.release_pool()
