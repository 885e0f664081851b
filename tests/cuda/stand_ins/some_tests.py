# SPDX-License-Identifier: BSD-3-Clause

"""A plugin of pytest for rehearsals: some of the tests that are quick on an emulation and need nothing but normfast."""

from __future__ import annotations

import re

import pytest

OTHERS = ("torch", "cupy", "jax", "numba")
SLOW = r"\d{4}|same_bits|batch_of_one|threads|reused"


def own(item):
    return not any(name in item.nodeid or name in item.fixturenames for name in OTHERS)


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(items):
    quick = [item for item in items if own(item) and not re.search(SLOW, item.nodeid)]
    items[:] = quick[::50] or items[:1]
