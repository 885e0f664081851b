"""How the tables of the board write a time."""

import pytest
from benchmarks.results import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.0, "2 s"), (0.01234, "12.3 ms"), (999.4e-6, "999 us"), (999.6e-6, "1 ms"), (0.9996, "1 s"), (7e-8, "70 ns"),
     (999.6e-9, "1 us")],
)  # fmt: skip
def test_three_digits_and_the_unit_that_fits_them(seconds, text):
    assert duration(seconds) == text
