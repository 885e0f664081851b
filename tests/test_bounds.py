"""What the board says a cell is bound by: the rule of ``benchmarks/bounds.py``, on cells made up for it."""

from __future__ import annotations

import pytest
from benchmarks import bounds
from benchmarks.results import Board, Cell
from benchmarks.shapes import Case


def _board() -> Board:
    content = {"schema": 1, "cells": [], "peers": {}, "lacking": {}, "machine": {"caches": {"L2": "1M", "L3": "32M"}}}
    return Board(content)


def _cell(case: Case, share: float, seconds: float = 1e-2) -> Cell:
    """A cell that moves its least traffic at this share of the limit."""
    result = {"seconds": seconds, "gbs": 40 * share, "spread": 0.0, "noisy": False}
    return Cell(case, "recycled", 1, {"results": {"normfast": result}, "limits": {"copy": {"gbs": 40.0}}})


ROWS, IMAGES = (65536, 1024), (32, 112, 112, 64)


@pytest.mark.parametrize(
    ("case", "share", "expected"),
    [
        (Case("layer_norm", ROWS), 0.81, "memory"),
        (Case("layer_norm", ROWS), 0.79, "reads and writes in turn"),
        (Case("layer_norm", ROWS, "bfloat16"), 0.5, "conversions"),
        (Case("layer_norm", (400000, 16)), 0.5, "work per statistic"),
        (Case("layer_norm", (128, 768)), 0.5, "arithmetic"),
        # Two thirds of the limit are all that two reads and a write leave.
        (Case("batch_norm", IMAGES, channel_axis=-1), 0.55, "memory, read twice"),
        (Case("batch_norm", IMAGES, channel_axis=-1), 0.5, "reads and writes in turn, read twice"),
        (Case("batch_norm_eval", IMAGES, channel_axis=-1), 0.55, "reads and writes in turn"),
        (Case("batch_norm", (32, 64, 112, 112)), 0.55, "reads and writes in turn"),
        (Case("batch_norm_backward", IMAGES, channel_axis=-1), 0.49, "memory, read twice"),
        (Case("batch_norm", (1, 512, 7, 7)), 0.3, "work per statistic"),
        (Case("batch_norm_eval", (1, 512, 7, 7)), 0.3, "arithmetic"),
    ],
)
def test_bound_by(case, share, expected):
    assert bounds.bound_by(_cell(case, share), _board()) == expected


def test_a_short_call_is_bound_by_the_call():
    assert bounds.bound_by(_cell(Case("layer_norm", (1, 768)), 0.9, seconds=1e-6), _board()) == "the call"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case("layer_norm", (8, 96, 7, 7), axis=1), 96),
        (Case("batch_norm", (2, 3, 5, 7)), 70),
        (Case("batch_norm", (2, 5, 7, 3), channel_axis=-1), 70),
        (Case("group_norm", (2, 8, 5, 7), groups=4), 70),
        (Case("group_norm", (2, 5, 7, 8), channel_axis=-1, groups=4), 70),
        (Case("instance_norm", (2, 8, 5, 7)), 35),
    ],
)
def test_cells_of_a_statistic(case, expected):
    assert bounds.cells_of_a_statistic(_cell(case, 1.0)) == expected
