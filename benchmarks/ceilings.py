"""What one thread reaches in the steps that a norm is made of: reading, writing past the caches, both, and runs apart.

The streaming limit of the board is a copy, which reads and writes at once. A norm that has to see all of its cells
before it writes the first reads, then writes; and where its cells lie in runs apart, it reads runs. The table says what
is left of the copy's rate then, on this machine. ``limits.c`` has the loops.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from .limits import Destination, load
from .measure import measure

KIB = 1 << 10
BYTES = 256 << 20  # whole columns of the longest runs
PARTS = 1  # of the table, which tick by themselves
READ, WRITE, COPY, TWO_STEPS, IN_TURNS, RUNS, RUNS_L1, RUNS_L2 = range(8)

# what, number in limits.c, bytes of a part, arrays moved at least
CASES = [
    ("read", READ, 4 * KIB, 1),
    ("write past the caches", WRITE, 4 * KIB, 1),
    ("copy past the caches", COPY, 4 * KIB, 2),
    *((f"read {kib} KiB, then copy them", TWO_STEPS, kib * KIB, 2) for kib in (4, 64, 512, 4096)),
    ("in turns of 4 KiB: copy, read what lies 512 KiB on", IN_TURNS, 512 * KIB, 2),
    *(
        (f"read runs of {kib} KiB{how}", kind, kib * KIB, 1)
        for kib in (4, 16, 64, 256)
        for kind, how in ((RUNS, ""), (RUNS_L1, ", fetched into L1"), (RUNS_L2, ", fetched into L2"))
    ),
]


class _Ceiling:
    hands_over = False

    def __init__(self, library: ctypes.CDLL, kind: int, part: int, x: np.ndarray, destination: Destination) -> None:
        self._keep = (x, destination)
        self._arguments = (kind, destination.array.ctypes.data, x.ctypes.data, x.nbytes, part)
        self._run = library.ceiling_run

    def sample(self, n: int) -> float:
        taken: float = self._run(*self._arguments, n)
        return taken


def table(rounds: int, tick: Callable[[], None]) -> list[dict[str, object]]:
    """One row per case: GB/s by the least traffic. Raises `native.CannotBuild`."""
    library = load()
    library.ceiling_run.restype = ctypes.c_double
    library.ceiling_run.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_long,
    )
    x = np.ones(BYTES, np.uint8)
    destination = Destination(x)
    contenders = {what: _Ceiling(library, kind, part, x, destination) for what, kind, part, _ in CASES}
    series = measure(contenders, threads=1, rounds=rounds, budget=120.0, tick=tick)
    rows = []
    for what, _, _, arrays in CASES:
        summary = series[what].summary()
        rows.append({"what": what, "gbs": 1e-9 * arrays * x.nbytes / summary["seconds"], "spread": summary["spread"]})
    return rows
