"""Do all contenders compute the same thing? Checked against `normfast.reference` before anything is timed.

The error of a large result (y, dx) is its largest absolute deviation over the largest absolute value expected. That of
a parameter gradient, a long sum, is the norm of the deviation over the norm of what is expected. Peers are given room
for single-precision sums over hundreds of thousands of cells; normfast is held to about what it promises.
"""

from __future__ import annotations

import numpy as np

from .peers import SUBJECT

# dtype: (normfast, peers, parameter gradients of peers). 16-bit results have 11 or 8 bits: normfast may be off by the
# last one, where two results were rounded differently; some peers round more than once, and some add 16-bit gradients
# up in 16 bits.
TOLERANCE = {
    "float64": (1e-13, 1e-9, 1e-9),
    "float32": (1e-6, 2e-3, 2e-3),
    "float16": (1e-3, 6e-3, 5e-2),
    "bfloat16": (8e-3, 4e-2, 0.8),
}
_GRADIENTS = ("dx", "dweight", "dbias")
_CHUNK = 1 << 16


def inaccurate(dtype: str, error: float) -> bool:
    """Tolerated, but worth a remark: a sum that lost most of its digits."""
    return error > TOLERANCE[dtype][1]


class Disagreement(Exception):
    """A contender's result is not the expected one."""


def check(
    name: str, dtype: str, backward: bool, results: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]
) -> float:
    """The largest error over the results. Raises `Disagreement` where one is not within its tolerance."""
    own, peers, gradients = TOLERANCE[dtype]
    names = _GRADIENTS if backward else ("y",)
    if len(results) != len(expected):
        raise Disagreement(f"{len(results)} results where {len(expected)} are expected")
    worst = 0.0
    for position, (label, result, wanted) in enumerate(zip(names, results, expected, strict=False)):
        result = np.asarray(result)
        if result.shape != wanted.shape:
            raise Disagreement(f"{label} has shape {result.shape}, expected {wanted.shape}")
        error = _largest(result, wanted) if position == 0 else _norm(result, wanted)
        tolerance = own if name == SUBJECT else (gradients if position else peers)
        if not error <= tolerance:  # so that NaN fails
            raise Disagreement(f"{label} is off by {error:.2g} of its size, {tolerance:.0e} tolerated")
        worst = max(worst, error)
    return worst


def _largest(result: np.ndarray, wanted: np.ndarray) -> float:
    """In chunks: large results are compared without large temporaries."""
    a, b = _flat(result), _flat(wanted)
    deviation = size = 0.0
    for start in range(0, a.size, _CHUNK):
        x = a[start : start + _CHUNK].astype(np.float64)
        y = b[start : start + _CHUNK].astype(np.float64)
        # np.maximum keeps a NaN, which max() would drop.
        deviation = float(np.maximum(deviation, np.abs(x - y).max()))
        size = max(size, float(np.abs(y).max()))
    return deviation / size if size else deviation


def _flat(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1)


def _norm(result: np.ndarray, wanted: np.ndarray) -> float:
    x, y = result.astype(np.float64), wanted.astype(np.float64)
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-300))
