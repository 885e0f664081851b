"""What a peer is: something that can prepare a call for a problem, or say why it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from ..problem import Problem


class Lacks(Exception):
    """This peer cannot run this problem; the text says why and appears in the results."""


@dataclass
class Contender:
    """One peer, ready to run one problem as often as asked."""

    call: Callable[[], Any]  # the work that is timed
    arrays: Callable[[Any], tuple[np.ndarray, ...]]  # what a call returned, as arrays to compare
    many: Callable[[int], Any] | None = None  # n calls at once, where that is cheaper than n times `call`
    note: str = ""  # how it was measured, where that needs saying
    hands_over: bool = False  # works on a thread of its own even where one thread is asked for

    def sample(self, n: int) -> float:
        """Seconds that n calls take."""
        if self.many is not None:
            start = perf_counter()
            self.many(n)
            return perf_counter() - start
        call, repeats = self.call, range(n)
        start = perf_counter()
        for _ in repeats:
            call()
        return perf_counter() - start


class Peer(ABC):
    name: str
    slow_start = False  # compiles for seconds per case: left out of a quick agreement check unless asked for by name

    def environment(self, threads: int) -> dict[str, str]:
        """Environment variables that must stand before the library is loaded."""
        return {}

    @abstractmethod
    def open(self, threads: int) -> str:
        """Load the library for this number of threads and return its version. Raises `Lacks` if it is not installed."""

    @abstractmethod
    def prepare(self, problem: Problem, recycled: bool) -> Contender:
        """A contender for this problem. Raises `Lacks`.

        With ``recycled``, results go to memory that has been written before, by the peer's own means where it has any
        (an ``out`` argument); else the call is the one that a user would write.
        """


def module(name: str) -> Any:
    """Import a library or say that it is not installed."""
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise Lacks("not installed") from None
