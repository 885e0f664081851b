# SPDX-License-Identifier: BSD-3-Clause

"""How many threads the functions use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _core

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["get_num_threads", "set_num_threads", "threads"]


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use, for the whole process.

    The results do not depend on it, to the last bit.

    Parameters
    ----------
    n : int
        1 or more; more than there are CPUs is allowed. Small arrays are computed on the caller's thread whatever `n`.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is less than 1 or too large.

    Notes
    -----
    At import the number is that of the environment variable ``NORMFAST_NUM_THREADS``, else that of
    ``OMP_NUM_THREADS``, else the number of CPUs that the process may run on.

    Examples
    --------
    >>> import normfast as nf
    >>> before = nf.get_num_threads()
    >>> nf.set_num_threads(2)
    >>> nf.get_num_threads()
    2
    >>> nf.set_num_threads(before)
    """
    _core.set_num_threads(n)


def get_num_threads() -> int:
    """How many threads a call may use.

    Returns
    -------
    int
        The number last set with `set_num_threads`, or the one found at import.

    Examples
    --------
    >>> import normfast as nf
    >>> nf.get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()


class threads:
    """Context manager that sets the number of threads and restores it on exit, exceptions included.

    The number is that of the process: other Python threads see it too while the block runs. The object can be used
    again, also within itself.

    Parameters
    ----------
    n : int
        As in `set_num_threads`, and checked at once.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is less than 1 or too large.

    Examples
    --------
    >>> import normfast as nf
    >>> before = nf.get_num_threads()
    >>> with nf.threads(1):
    ...     nf.get_num_threads()
    1
    >>> nf.get_num_threads() == before
    True
    """

    __slots__ = ("_n", "_previous")

    def __init__(self, n: int) -> None:
        _core.check_num_threads(n)
        self._n = n
        self._previous: list[int] = []

    def __repr__(self) -> str:
        return f"threads({self._n!r})"

    def __enter__(self) -> None:
        previous = _core.get_num_threads()
        _core.set_num_threads(self._n)
        self._previous.append(previous)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _core.set_num_threads(self._previous.pop())
