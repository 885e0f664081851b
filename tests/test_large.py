"""Promise 6: indices are 64-bit."""

from __future__ import annotations

import os

import numpy as np
import pytest

import normfast as nf
from _cases import data
from _checks import F16, assert_same_bits


def available():
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


@pytest.mark.slow
@pytest.mark.skipif(available() < 8 << 30, reason="needs 8 GB of free memory: not run")
@pytest.mark.parametrize("op", ["layer", "instance", "batch"])
def test_more_than_two_to_the_31_cells(op):
    """In place, in float16; the last reductions have the bits that they have alone."""
    rows, width = (1 << 21) + 3, 1025
    assert rows * width > 1 << 31
    block = data((4096, width), F16)
    x = np.empty((rows, width), F16)
    for start in range(0, rows, 4096):
        x[start : start + 4096] = block[: rows - start]
    tail = x[-5:].copy()
    if op == "layer":
        want = nf.layer_norm(tail)
        assert nf.layer_norm(x, out=x) is x
        assert_same_bits(x[-5:], want)
    elif op == "instance":
        want = nf.instance_norm(tail.reshape(1, 5, width))
        assert nf.instance_norm(x.reshape(1, rows, width), out=x.reshape(1, rows, width)) is not None
        assert_same_bits(x[-5:], want[0])
    else:
        mean, var = np.linspace(-1, 1, width), np.linspace(0.5, 2, width)
        want = nf.batch_norm(tail, mean, var)
        assert nf.batch_norm(x, mean, var, out=x) is x
        assert_same_bits(x[-5:], want)
