"""The streaming limits, measured in the same rounds as the contenders: see ``limits.c``."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from . import native
from .problem import Problem

# name: (number in limits.c, arrays moved)
KINDS = {"copy": (0, 2), "copy, non-temporal": (1, 2), "triad": (2, 3), "triad, non-temporal": (3, 3)}
_HUGE = 2 << 20


def names_for(backward: bool) -> list[str]:
    return [name for name, (_, moved) in KINDS.items() if moved == (3 if backward else 2)]


class Destination:
    """Huge-page memory for the limits to write, touched once. It lies half a page off x, as a good kernel's output
    would: with a small odd distance between the two, aliasing in the page costs 15-20 %."""

    def __init__(self, like: np.ndarray) -> None:
        # Private: shared memory, mmap's default, has no huge pages, and a copy into it reaches two thirds of the rate.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._map = mmap.mmap(-1, like.nbytes + 3 * _HUGE, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        base = np.frombuffer(self._map, np.uint8)
        base[::4096] = 0
        start = -base.ctypes.data % _HUGE + (like.ctypes.data + 2048) % 4096 // 64 * 64
        self.array = base[start : start + like.nbytes]


class Limit:
    """One limit at one working set, with the same interface for sampling as a contender."""

    hands_over = False

    def __init__(
        self, library: ctypes.CDLL, kind: str, problem: Problem, destination: Destination, threads: int
    ) -> None:
        number, self.streams = KINDS[kind]
        self._keep = (problem.x, problem.dy, destination)
        x, other = problem.x, problem.x if problem.dy is None else problem.dy
        self._moved = ctypes.c_size_t()
        self._threads = threads
        self._arguments = (number, destination.array.ctypes.data, x.ctypes.data, other.ctypes.data, x.nbytes, threads)
        self._run = library.limit_run

    def sample(self, n: int) -> float:
        taken = self._run(*self._arguments, n, ctypes.byref(self._moved))
        if taken < 0:
            raise RuntimeError(f"limits: cannot start {self._threads} threads")
        return taken

    def call(self) -> None:
        self.sample(1)

    @property
    def nbytes(self) -> int:
        """Bytes read and written by one call."""
        return self._moved.value * self.streams


def load() -> ctypes.CDLL:
    """Compile and load the helper. Raises `native.CannotBuild`."""
    library = native.build("limits.c", native.C, ("-march=native", "-pthread", "-std=gnu11"))
    library.limit_run.restype = ctypes.c_double
    library.limit_run.argtypes = (
        ctypes.c_int,
        *(ctypes.c_void_p,) * 3,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_long,
        ctypes.POINTER(ctypes.c_size_t),
    )
    return library


def prepare(library: ctypes.CDLL, problem: Problem, threads: int) -> dict[str, Limit]:
    """The limits that bound this problem. Arrays too small for one step per thread have none."""
    if problem.x.nbytes < 512 * threads:
        return {}
    destination = Destination(problem.x)
    names = names_for(problem.case.backward)
    if not library.limit_has_non_temporal():
        names = names[:1]
    return {name: Limit(library, name, problem, destination, threads) for name in names}
