"""Comparisons in the units of the promises: ulps of a reduction's largest value, norms of gradients, bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from _oracle import LD, exact

F16, BF16, F32, F64 = (np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
DTYPES = [F16, BF16, F32, F64]
WIDE = [F32, F64]
NARROW = [F16, BF16]

# digits of the significand, exponent of the smallest normal number
_FORMAT = {F16: (11, -14), BF16: (8, -126), F32: (24, -126), F64: (53, -1022)}

FORWARD_ULPS = {F32: 3, F64: 16}  # promise 2
GRADIENT_ERROR = {F32: 1e-6, F64: 1e-12}  # float32: promise 2; float64: far below what any use needs


def stat_dtype(dtype):
    """Statistics are float32 for 16-bit x, else float64."""
    return F32 if dtype.itemsize == 2 else F64


def ulp(values, dtype):
    """Distance between neighbours of `dtype` at the size of `values`."""
    digits, least = _FORMAT[np.dtype(dtype)]
    fraction, exponent = np.frexp(np.abs(exact(values)))
    exponent = np.where(fraction == 0, least, exponent)  # of 0 it would be that of 0.5
    return np.ldexp(LD(1), np.maximum(exponent - 1, least) - (digits - 1))


def forward_ulps(y, want):
    """Largest error of y in the units of promise 2.

    A 16-bit result is one rounding away from a float32-accurate one: what lies beyond half a 16-bit ulp counts, in
    float32 ulps.
    """
    dtype = y.dtype.newbyteorder("=")
    if y.size == 0:
        return 0.0
    error = np.abs(exact(y) - want.y)
    if dtype.itemsize == 2:
        error = np.maximum(error - ulp(y, dtype) / 2, 0)
        dtype = F32
    return float((error / ulp(want.scale, dtype)).max())


def assert_forward(y, want, ulps=None):
    assert np.isfinite(y.astype(np.float64)).all()
    assert y.shape == want.y.shape
    error = forward_ulps(y, want)
    limit = FORWARD_ULPS.get(y.dtype, 3) if ulps is None else ulps
    assert error <= limit, f"{error:.2f} ulp, at most {limit} are promised"


def gradient_error(got, want, terms):
    """||error|| / ||exact||, or over the terms that cancel where the exact gradient is less than a tenth of them."""
    error = np.abs(exact(got) - want)
    if got.dtype.itemsize == 2:
        error = np.maximum(error - ulp(got, got.dtype.newbyteorder("=")) / 2, 0)
    error, size = float(np.sqrt((error**2).sum())), float(np.sqrt((want**2).sum()))
    if size < 0.1 * terms:
        size = terms
    return error / size if size else error


def assert_gradient(got, want, terms, limit=None):
    assert got.shape == want.shape
    assert np.isfinite(got.astype(np.float64)).all()
    error = gradient_error(got, want, terms)
    limit = GRADIENT_ERROR.get(got.dtype, 1e-6) if limit is None else limit
    assert error <= limit, f"gradient off by {error:.2e}, at most {limit:.0e} is promised"


def assert_gradients(got, want, limit=None):
    """`got` is what a backward function returned, None where a gradient was not asked for."""
    names = ("dx", "dweight", "dbias")
    for name, array in zip(names, got, strict=False):
        if array is not None:
            assert_gradient(array, getattr(want, name), getattr(want, name + "_terms"), limit)


def assert_stats(mean, rstd, want, x_dtype):
    """Dtype and shape as documented, values good enough to compute y and dx from."""
    expected = stat_dtype(x_dtype)
    # Half an ulp for the float32 statistics of 16-bit x; the rest is the accuracy that the results need.
    relative = 4e-7 if x_dtype != F64 else 1e-13
    assert rstd.dtype == expected
    assert rstd.shape == want.rstd.shape
    np.testing.assert_allclose(rstd.astype(np.float64), want.rstd.astype(np.float64), rtol=relative)
    if mean is not None:
        assert mean.dtype == expected
        assert mean.shape == want.mean.shape
        spread = np.sqrt(want.var)
        slack = relative * spread + ulp(want.mean, expected)
        assert (np.abs(exact(mean) - want.mean) <= slack).all()


def bits(array):
    """The values of an array as bytes, in C order; every NaN is one NaN, since payloads are not promised."""
    array = np.array(array, order="C", copy=True)
    unknown = np.isnan(array.astype(np.float64))
    if unknown.any():
        array[unknown] = np.nan
    return array.tobytes()


def same_bits(a, b):
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def assert_same_bits(a, b):
    """Of two arrays, or of two tuples of arrays."""
    a = a if isinstance(a, tuple) else (a,)
    b = b if isinstance(b, tuple) else (b,)
    assert len(a) == len(b)
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        if not same_bits(one, other):
            differ = (exact(one) != exact(other)).sum() if one is not None and other is not None else "all"
            raise AssertionError(f"result {i}: {differ} of {np.size(one)} cells differ")


def nudged(array):
    """A copy whose last cell is the next representable number: what a bitwise comparison must notice."""
    array = np.array(array, order="C", copy=True)
    cell = array.reshape(-1)[-1:]
    cell[:] = np.nextafter(cell, np.asarray(np.inf, cell.dtype))
    return array
