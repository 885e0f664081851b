# SPDX-License-Identifier: BSD-3-Clause

"""The memory that is kept for results to come."""

from __future__ import annotations

from . import _core

__all__ = ["release_pool", "set_pool_limit"]


def set_pool_limit(nbytes: int) -> None:
    """Set how much freed memory of large results is kept for results to come.

    Memory fresh from the operating system is slow at first touch. The memory of a large result (1 MiB or more) that is
    no longer referenced is therefore kept and given to the next one. What is held beyond the new limit is released at
    once; memory in use does not count.

    Parameters
    ----------
    nbytes : int
        The limit in bytes, 0 or more. 0 turns the pool off.

    Raises
    ------
    TypeError
        If `nbytes` is not an integer.
    ValueError
        If `nbytes` is negative or too large.

    See Also
    --------
    release_pool : Release what is held and keep the limit.

    Notes
    -----
    At import the limit is that of the environment variable ``NORMFAST_POOL_BYTES``, else a quarter of the machine's
    memory, at most 1 GiB. `show_config` shows the limit and what is held.

    Examples
    --------
    >>> import normfast as nf
    >>> limit = nf.show_config(mode="dicts")["pool"]["limit"]
    >>> nf.set_pool_limit(256 * 2**20)
    >>> nf.show_config(mode="dicts")["pool"]["limit"]
    268435456
    >>> nf.set_pool_limit(limit)
    """
    _core.set_pool_limit(nbytes)


def release_pool() -> None:
    """Give the memory that is kept for results to come back to the operating system.

    Arrays in use are not touched, and the limit stays.

    See Also
    --------
    set_pool_limit : Limit what is kept.

    Examples
    --------
    >>> import normfast as nf
    >>> nf.release_pool()
    >>> nf.show_config(mode="dicts")["pool"]["held"]
    0
    """
    _core.release_pool()
