"""Sums down the columns of a matrix have three ways, by its width and length; all give the bits of contiguous rows."""

import ml_dtypes
import numpy as np
import pytest

import normfast as nf

WIDTHS = [1, 3, 10, 15, 16, 17, 49, 63, 64, 100]  # below 64 and no whole vectors: narrow
LENGTHS = [1, 15, 16, 17, 64, 65, 255, 256, 257, 1024, 1025, 4200, 16384, 16500]  # up to 256: short; 16384: a chunk
DTYPES = [np.float32, np.float64, ml_dtypes.bfloat16]


def _data(rows, width, dtype, count=1):
    rng = np.random.default_rng(rows * 1000 + width)
    made = [(rng.standard_normal((rows, width)) * 3 + 5).astype(dtype) for _ in range(count)]
    return made[0] if count == 1 else made


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_batch_norm_of_columns_and_of_planes(width, dtype):
    """(N, C) goes down the columns; the same cells as one image of C planes go along them. In one chunk their sums have
    the same order; beyond, a plane is added in larger ones."""
    weight = np.linspace(0.5, 2, width)
    for rows in (n for n in LENGTHS[1:] if n <= 8192):
        dy, x = _data(rows, width, dtype, 2)
        _, mean, rstd = nf.batch_norm(x, None, None, training=True, return_stats=True)
        columns = nf.batch_norm_backward(dy, x, mean, rstd, weight)
        planes = nf.batch_norm_backward(_turned(dy)[None], _turned(x)[None], mean, rstd, weight)
        for name, one, other in zip(
            ("dx", "dweight", "dbias"), (columns[0].T, *columns[1:]), (planes[0][0], *planes[1:]), strict=True
        ):
            np.testing.assert_array_equal(_bits(one), _bits(other), err_msg=f"{name}, {rows} rows")
