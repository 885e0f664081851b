"""Runs the tests that a mutation should make fail, in a process of its own for each: a mutant may crash or never end.

    python _mutants.py LIBRARY plain|asan NUMBER...

prints for every number which test failed, or "survived". LIBRARY holds all mutations (mutations.py).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import signal
import sys
from dataclasses import replace

import _kernels
import _matrix
import numpy as np
import pytest
import test_emulation as suite
from _kernels import Kernels, plan
from mutations import mutations

import _cases
from _cases import batch, group, instance, layer, rms
from _checks import BF16, F16, F32, F64

SEEDS = (1, 2, 3, 4, 6, 7, 8, 9)
SECONDS = 20  # for one test, mostly some milliseconds: what takes longer does not end
MATRIX = {
    "rows": _matrix.ROWS + _matrix.GROUPS + _matrix.RUNS,
    "rows_backward": _matrix.ROWS[::3] + _matrix.GROUPS + _matrix.RUNS,
    "row_params": _matrix.ROWS,
    "columns": _matrix.COLUMNS,
    "columns_backward": _matrix.COLUMNS,
    "affine": _matrix.EVALUATION + _matrix.COLUMNS,
    "maps": _matrix.COLUMNS + _matrix.EVALUATION,
    "runs": _matrix.RUNS + _matrix.GROUPS + _matrix.ROWS,
    "warp": _matrix.CASES[::2],
}
# Rows in a warp of which some take the careful way, and what is in no sample.
SPECIAL = [*suite.WAYS, layer((2, 9000)), layer((33, 5)), rms((33, 9)), batch((64, 16), training=True)]


def remembered(function):
    """What is expected of the same arrays once more. A child inherits what its parent knows."""
    known = {}

    @functools.wraps(function)
    def recall(*arguments, **named):
        key = str([a.tobytes() if isinstance(a, np.ndarray) else a for a in (*arguments, *named.items())])
        digest = hashlib.sha256(key.encode()).digest()
        if digest not in known:
            known[digest] = function(*arguments, **named)
        return known[digest]

    return recall


def remember_all():
    _kernels.expect_forward = remembered(_kernels.expect_forward)
    _kernels.expect_backward = remembered(_kernels.expect_backward)
    suite.expect_forward = _kernels.expect_forward
    _cases.Case.exact_stats = remembered(_cases.Case.exact_stats)


def in_slices(case):
    """Is it columns.cu that computes it?"""
    kind, g = plan(case)
    return kind == "columns" and (g[4] == 0 or g[3] < 16)


def tests(stem, barrier):
    """Name and function of each test, the cheapest first; under many schedules for what a barrier orders."""
    cases = sorted(MATRIX[stem], key=lambda c: c.geometry.cells.size)
    forward = stem not in ("rows_backward", "row_params", "columns_backward")
    backward = stem not in ("rows", "columns", "affine")
    for sample in _matrix.samples(cases):
        if forward:
            yield f"{sample} forward", sample.forward
        if backward:
            yield f"{sample} backward", sample.backward
    rows, columns = "row" in stem or stem == "runs", "columns" in stem or stem in ("maps", "affine")

    def concerned(cases):
        return (c for c in cases if not (rows and in_slices(c)) and not (columns and not in_slices(c)))

    for case in concerned(SPECIAL):
        for dtype in (F32, BF16):
            yield (
                f"neighbours {case}",
                lambda lib, c=case, d=dtype: suite.test_neighbours_that_float32_cannot_hold(lib, c, d),
            )
        yield f"needs {case}", lambda lib, c=case: suite.test_needs(lib, c)
        for cluster in (8, 1):
            yield f"in place {case}", lambda lib, c=case, n=cluster: suite.test_in_place(lib, c, F32, n)
    for case in concerned(suite.ALL):
        for dtype in (F32, F16):
            yield f"alignment {case}", lambda lib, c=case, d=dtype: suite.test_alignment(lib, c, d)
    if stem == "row_params":
        yield "slices of wide rows", lambda lib: suite.test_slices_of_wide_rows(lib, (131, 4101), F32)
    for case in (batch((300, 37)), batch((5, 3, 16)), batch((7, 5))):
        yield "running", lambda lib, c=case: suite.test_running_averages(lib, c, (F32, F32), 1)
    yield "extreme", suite.test_evaluation_with_extreme_statistics
    for case in (
        ()
        if columns
        else (layer((1, 70001)), group((2, 3, 30011), 1), group((2, 4, 91, 93), 2), instance((2, 2, 90, 91)))
    ):
        for cluster in (8, 1):
            yield f"in place {case}", lambda lib, c=case, n=cluster: suite.test_in_place(lib, c, F32, n)
    if not barrier:
        return
    small = [s for s in _matrix.samples(cases) if s.dtype in (F32, F16, F64) and s.case.geometry.cells.size < 10000]
    for seed in SEEDS:
        for sample in small:
            other = replace(sample, options=replace(sample.options, seed=seed, cluster=8))
            if forward:
                yield f"{other} forward", other.forward
            if backward:
                yield f"{other} backward", other.backward


def outcome(lib, number, stem, barrier):
    """Of one mutant: the name of the test that failed, or None."""
    ctypes.c_int.in_dll(lib.dll, "nf_mutant").value = number
    for name, test in tests(stem, barrier):
        signal.alarm(SECONDS if number else 0)
        lib.set_schedule(0)
        lib.set_max_cluster(8)
        lib.rooms.clear()
        try:
            test(lib)
        except pytest.skip.Exception:
            pass  # a test that does not concern this case says so by skipping; it has noticed nothing
        except Exception as e:
            return f"{name}: {type(e).__name__} {str(e).splitlines()[0] if str(e) else ''}"
    return None


def alone(lib, number, stem, barrier):
    """The same in a child."""
    sys.stdout.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        result = outcome(lib, number, stem, barrier)
        os.write(writer, (result or "survived").encode()[:300])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        result = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return result if status == 0 and result else f"ended by status {status}"


def one_stem(lib, stem, mutants):
    # Nothing fails without a mutation, and the children know what to expect.
    fails = outcome(lib, 0, stem, any(m.is_barrier for m in mutants))
    if fails is not None:
        print(0, fails, flush=True)
        return
    for m in mutants:
        print(m.number, alone(lib, m.number, stem, m.is_barrier), flush=True)


def main(path, variant, *numbers):
    lib = Kernels(path, guard=0 if variant == "asan" else 64)
    remember_all()
    stems: dict[str, list] = {}
    for m in mutations():
        if m.number in set(map(int, numbers)):
            stems.setdefault(m.stem, []).append(m)
    order = sorted(stems, key=lambda stem: -len(stems[stem]))
    # A worker per core; each takes a stem from the pipe, the longest first, until none is left.
    queue, feed = os.pipe()
    os.write(feed, bytes(range(len(order))))
    os.close(feed)
    workers = []
    for _ in range(os.cpu_count() or 1):
        workers.append(os.fork())
        if workers[-1] == 0:
            while number := os.read(queue, 1):
                one_stem(lib, order[number[0]], stems[order[number[0]]])
            os._exit(0)
    for worker in workers:
        if os.waitpid(worker, 0)[1] != 0:
            sys.exit("a worker ended early")


if __name__ == "__main__":
    main(*sys.argv[1:])
