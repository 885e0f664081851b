"""Exact results in a wider format, and errors in the units of the promises.

float64 for float32 and 16-bit data, x86's long double for float64 data: 2^-29 and 2^-11 of an ulp to begin with. Data
are shifted by a cell of their own before they are summed, so that a mean far from zero costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .inputs import Sample

QUANTITIES = ("y", "dx", "dweight", "dbias")
# digits of the significand, exponent of the smallest normal number, largest number
_FORMAT = {
    "float16": (11, -14, 65504.0),
    "bfloat16": (8, -126, 3.3895e38),
    "float32": (24, -126, 3.4028235e38),
    "float64": (53, -1022, np.inf),
}


@dataclass
class Result:
    """One exact array: by the size of `unit` its ulps are measured; `terms` is the norm of what it is a sum of."""

    value: np.ndarray
    unit: np.ndarray
    terms: float


def wider(dtype: str) -> type:
    if dtype != "float64":
        return np.float64
    if np.finfo(np.longdouble).nmant < 63:
        raise SystemExit("long double of this platform is float64: nothing to measure float64 by")
    return np.longdouble


def norm(values: np.ndarray) -> float:
    """Euclidean norm of numbers whose squares may leave the range of float64."""
    largest = np.abs(values).max(initial=0)
    return float(largest * np.sqrt(((values / largest) ** 2).sum())) if 0 < largest < np.inf else float(largest)


def solve(sample: Sample, stats: tuple | None = None) -> dict[str, Result]:
    """The exact y, dx, dweight and dbias; the gradients at `stats` = (mean or None, rstd) where they are given."""
    view, centred = sample.view, sample.case.family != "rms_norm"
    wide = wider(sample.case.dtype)
    x, dy = (a.astype(wide).reshape(view.shape) for a in (sample.x, sample.dy))
    weight = sample.weight.astype(wide).reshape(view.parameters)
    bias = wide(0) if sample.bias is None else sample.bias.astype(wide).reshape(view.parameters)

    def mean(a):
        return a.mean(axis=view.axes, keepdims=True)

    if sample.running is not None:
        at, var = (a.astype(wide).reshape(view.stats) for a in sample.running)
        d = x - at
    else:
        d = x
        if centred:
            d = x - x[tuple(slice(1) if i in view.axes else slice(None) for i in range(x.ndim))]
            still = (d == 0).all(axis=view.axes, keepdims=True)
            for _ in range(2):  # the second time for the rounding errors of the first
                d = np.where(still, 0, d - mean(d))
        var = mean(d * d)
    with np.errstate(divide="ignore"):
        rstd = 1 / np.sqrt(var + wide(sample.eps))
    rstd[np.isinf(rstd)] = 0  # constant data at eps=0: y is the bias and depends on no x
    xhat = d * rstd
    del d
    scaled = xhat * weight
    y = Result(scaled + bias, (np.abs(scaled) + np.abs(bias)).max(axis=view.axes, keepdims=True), 0.0)
    if stats is not None:
        at, rstd = (wide(0) if a is None else a.astype(wide).reshape(view.stats) for a in stats)
        rstd = np.where(np.isinf(rstd), 0, rstd)
        xhat = (x - at) * rstd
    del x, scaled
    g = dy * weight * rstd
    terms = [g]
    if sample.running is None:
        terms.append(-xhat * mean(g * xhat))
        if centred:
            terms.append(np.broadcast_to(-mean(g), g.shape))
    sizes = sum(np.abs(t) for t in terms)
    dx = Result(sum(terms), sizes.max(axis=view.axes, keepdims=True), norm(np.array([norm(t) for t in terms])))
    # A cell of normalised data counts as one at least: its error is that of the largest cells beside it.
    results = {
        "y": y,
        "dx": dx,
        "dweight": _sum(dy * xhat, dy * np.maximum(np.abs(xhat), 1), view),
        "dbias": _sum(dy, dy, view),
    }
    if not centred:
        del results["dbias"]
    return results


def _sum(terms: np.ndarray, sizes: np.ndarray, view) -> Result:
    """Ulps of the root of the sum of squares, what terms of random sign add up to, or of the sum where it is larger."""

    def total(a):
        return a.sum(axis=view.gradient_axes, keepdims=True)

    value, spread = total(terms), np.sqrt(total(terms * terms))
    return Result(value, np.maximum(np.sqrt(total(sizes * sizes)), np.abs(value)), norm(spread))


def ulp(values: np.ndarray, dtype: str) -> np.ndarray:
    """Distance between neighbouring numbers of `dtype` at the size of `values`."""
    digits, least, _ = _FORMAT[dtype]
    values = np.ascontiguousarray(values, np.float64)
    power = (values.view(np.int64) & (0x7FF << 52)).view(np.float64)
    return np.maximum(power, 2.0**least) * 2.0 ** (1 - digits)


@dataclass
class Error:
    ulps: float  # the largest, one ulp being that of the largest in the reduction, or of the terms of a sum
    norm: float  # of the error, over that of the exact result or of its terms, whichever is larger
    strict: float  # the same over the exact result alone, down to a tenth of the terms


def error(got: np.ndarray, exact: Result, dtype: str) -> Error:
    """16-bit results are promised to be float32-accurate ones rounded once: what lies beyond half an ulp of their own
    counts, in float32 ulps."""
    got = got.reshape(exact.value.shape)
    with np.errstate(invalid="ignore"):
        off = np.abs(got.astype(exact.value.dtype) - exact.value).astype(np.float64)
    off[np.isinf(got.astype(np.float64)) & (np.abs(exact.value) > _FORMAT[dtype][2])] = 0  # as a rounding does
    off[np.isnan(off)] = np.inf
    if dtype in ("float16", "bfloat16"):
        off = np.maximum(off - ulp(exact.value, dtype) / 2, 0)
        dtype = "float32"
    ulps = float((off / ulp(exact.unit, dtype)).max(initial=0))
    total, size, terms = norm(off), norm(exact.value), exact.terms
    if not total:
        return Error(ulps, 0.0, 0.0)
    return Error(ulps, total / (max(size, terms) or 1), total / ((size if size >= 0.1 * terms else terms) or 1))


def errors(results: dict[str, np.ndarray], exact: dict[str, Result], dtype: str) -> dict[str, Error]:
    """By quantity; those that a library does not give are left out."""
    return {name: error(results[name], exact[name], dtype) for name in exact if name in results}
