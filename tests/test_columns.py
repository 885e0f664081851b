"""Sums down the columns of a matrix: by lanes, with the bits of contiguous rows, or, for batch norm, row by row."""

import ml_dtypes
import numpy as np
import pytest

import normfast as nf
from _cases import batch
from _checks import BF16, F32, F64, assert_forward, assert_gradients, assert_stats

WIDTHS = [1, 3, 10, 15, 16, 17, 49, 63, 64, 100]  # below 64 and no whole vectors: narrow
LENGTHS = [1, 15, 16, 17, 64, 65, 255, 256, 257, 1024, 1025, 4200, 16384, 16500]  # up to 256: short; 16384: a chunk
DTYPES = [np.float32, np.float64, ml_dtypes.bfloat16]


def _data(rows, width, dtype):
    rng = np.random.default_rng(rows * 1000 + width)
    return (rng.standard_normal((rows, width)) * 3 + 5).astype(dtype)


def _bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


def _turned(array):
    return np.ascontiguousarray(array.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_down_the_columns(width, dtype):
    for rows in LENGTHS:
        x = _data(rows, width, dtype)
        y, mean, rstd = nf.layer_norm(x, axis=0, return_stats=True)
        expected = nf.layer_norm(_turned(x), return_stats=True)
        for name, one, other in zip(("y", "mean", "rstd"), (y.T, mean, rstd), expected, strict=True):
            np.testing.assert_array_equal(_bits(one.ravel()), _bits(other.ravel()), err_msg=f"{name}, {rows} rows")


# A chain is 4 rows, a group 16, a block 64, a chunk 4096; below 128 columns several rows are summed together.
BATCH_WIDTHS = [1, 3, 16, 49, 127, 130, 513]
BATCH_LENGTHS = [2, 5, 16, 19, 64, 65, 127, 129, 4096, 4099, 8200]


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("width", BATCH_WIDTHS)
def test_batch_norm_down_the_columns(width, dtype):
    """Far from zero, so that a cell that is added twice, left out or given to its neighbour shows."""
    for rows in BATCH_LENGTHS if width < 100 else (*BATCH_LENGTHS[:-3], 4099):
        case = batch((rows, width))
        x = (case.x(F64) + 20 + 5 * np.arange(width)).astype(dtype)
        weight, bias, dy = case.weight(dtype), case.bias(dtype), case.dy(dtype)
        y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
        assert_forward(y, case.exact_forward(x, weight, bias))
        assert_stats(mean, rstd, case.exact_forward(x), dtype)
        exact = case.exact_stats(x)
        assert_gradients(case.backward(dy, x, *exact, weight), case.exact_backward(dy, x, *exact, weight))
