# SPDX-License-Identifier: BSD-3-Clause

"""Results against `normfast.reference` before anything is timed: parts of them, so that it takes no time.

A part is what the reference can work out alone: some rows for layer and RMS norm, and some columns for their parameter
gradients; the first group of channels of every sample for group norm; a few channels for the other two.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import normfast as nf

from ..agreement import TOLERANCE, Disagreement
from .cases import Case
from .problem import Problem


def host(a: Any) -> np.ndarray | None:
    return None if a is None else a.double().cpu().numpy()


def _error(got: Any, want: np.ndarray, *, norm: bool) -> float:
    got = host(got)
    if got.shape != want.shape:
        raise Disagreement(f"shape {got.shape} where {want.shape} is expected")
    if norm:
        return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300))
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-300))


def _compare(name: str, dtype: str, pairs: list[tuple[str, Any, np.ndarray]]) -> float:
    own, peers, gradients = TOLERANCE[dtype]
    worst = 0.0
    for label, got, want in pairs:
        parameter = label in ("dweight", "dbias")
        error = _error(got, want, norm=parameter)
        tolerance = own if name == "normfast" else gradients if parameter else peers
        if name == "normfast" and parameter and dtype == "float32":
            tolerance *= 4  # of a few columns, where the promise is for all together
        if not error <= tolerance:  # so that NaN fails
            raise Disagreement(f"{label} is off by {error:.2g} of its size, {tolerance:.0e} tolerated")
        worst = max(worst, error)
    return worst


def check(name: str, problem: Problem, result: Any, i: int = 0) -> float:
    """The largest error of `result`, the contender's on set i. Raises `Disagreement`."""
    case = problem.case
    pairs = _backward_pairs(problem, result, i) if case.backward else _forward_pairs(problem, result, i)
    return _compare(name, case.dtype, pairs)


def _parts(problem: Problem) -> list[Any]:
    """Indices into x of what stands alone."""
    case = problem.case
    if case.per_row:
        rows = case.shape[0]
        return [slice(0, 4), slice(rows // 2, rows // 2 + 2), slice(max(rows - 3, 0), rows)]
    n = case.channels
    width = n // case.groups if case.groups else 1
    return [(slice(None), slice(start, start + width)) for start in (0, n // width // 2 * width, n - width)]


def _statistics(case: Case, stats: Any, part: Any) -> list[Any]:
    """Those of a part."""
    if case.per_row:
        return [s[part] for s in stats]
    at = part[1]
    if case.op == "group_norm":
        g = at.start // (case.channels // case.groups)
        return [s[:, g : g + 1] for s in stats]
    return [s[..., at] for s in stats]


def _forward_pairs(problem: Problem, result: Any, i: int) -> list[tuple[str, Any, np.ndarray]]:
    case, reference = problem.case, getattr(nf.reference, problem.case.op)
    y, *stats = result if isinstance(result, tuple | list) else (result,)
    names = ("mean", "rstd")[-len(stats) :] if stats else ()
    w, b = host(problem.weight), host(problem.bias)
    pairs = []
    for part in _parts(problem):
        x = host(problem.x[i][part])
        if case.per_row:
            want = reference(x, *(p for p in (w, b) if p is not None), return_stats=True)
        else:
            wb, groups = (w[part[1]], b[part[1]]), (1,) if case.groups else ()
            if case.op == "batch_norm":
                want = reference(x, None, None, *wb, training=True, return_stats=True)
            else:
                want = reference(x, *groups, *wb, return_stats=True)
        pairs.append(("y", y[part], want[0]))
        pairs += zip(names, _statistics(case, stats, part), want[1:], strict=False)  # where they were asked for
    return pairs


def _backward_pairs(problem: Problem, result: Any, i: int) -> list[tuple[str, Any, np.ndarray]]:
    case, reference = problem.case, getattr(nf.reference, problem.case.op + "_backward")
    names = ("dx", "dweight", "dbias")
    needs = ("x", "weight", "bias")[: 2 + case.center]
    w, pairs = host(problem.weight), []
    for part in _parts(problem):
        arrays = [host(a[part]) for a in (problem.dy[i], problem.x[i])]
        stats = [host(s) for s in _statistics(case, problem.stats[i], part)]
        if case.per_row:
            pairs.append(("dx", result[0][part], reference(*arrays, *stats, w)[0]))
            continue
        at = part[1]
        want = reference(*arrays, *stats, w[at], needs=needs)
        pairs.append(("dx", result[0][part], want[0]))
        pairs += [(n, r[at], e) for n, r, e in zip(names[1:], result[1:], want[1:], strict=False) if r is not None]
    if case.per_row and case.step == "backward":
        # The gradients of a few columns need nothing of the others once the statistics are given.
        last = case.channels - 1
        columns = sorted({0, last // 3, last // 2, last})
        arrays = [host(a[:, columns]) for a in (problem.dy[i], problem.x[i])]
        stats = [host(s) for s in problem.stats[i]]
        want = reference(*arrays, *stats, w[columns], needs=needs)
        pairs += [(n, r[columns], e) for n, r, e in zip(names[1:], result[1:], want[1:], strict=False)]
    return pairs
