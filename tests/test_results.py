"""How the tables of the board write a time, and what a board may be called."""

from argparse import ArgumentTypeError

import pytest
from benchmarks.results import board_path, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.0, "2 s"), (0.01234, "12.3 ms"), (999.4e-6, "999 us"), (999.6e-6, "1 ms"), (0.9996, "1 s"), (7e-8, "70 ns"),
     (999.6e-9, "1 us")],
)  # fmt: skip
def test_three_digits_and_the_unit_that_fits_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("name", ["board", "out/board", "board.v2", "board.md"])
def test_board_path(name):
    """A board without an ending would bear the name of its folder of pictures: that failed after the last cell."""
    with pytest.raises(ArgumentTypeError, match=r"board.*\.json$"):
        board_path(name)
    assert board_path(f"{name}.json").name.endswith(".json")
