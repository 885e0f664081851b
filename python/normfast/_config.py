# SPDX-License-Identifier: BSD-3-Clause

"""What this build is and how it is set."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np

from . import _core

__all__ = ["show_config"]


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: object = "stdout") -> dict[str, Any] | None:
    """Print or return how normfast was built and how it is set.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, optional
        Whether to print, or to return a dictionary. Default: "stdout".

    Returns
    -------
    dict or None
        None if printed, else a dictionary with the keys

        version
            The version of normfast.
        code_path
            The code path in use: "baseline", "x86-64-v3", "x86-64-v4" or "arm64".
        code_paths
            The code paths that were built. The environment variable ``NORMFAST_ISA`` chooses one of them.
        threads
            How many threads a call may use; see `set_num_threads`.
        pool
            ``limit`` and ``held``, in bytes; see `set_pool_limit`.
        cuda
            ``built``: whether the CUDA backend was; ``available``: whether it finds a device; ``toolkit`` and
            ``architectures``: what it was built with and for; ``devices``: name and compute capability of each;
            ``reason``: why there is none, or None.
        compiler
            The compiler and its version.
        numpy
            The version of NumPy in use.

    Raises
    ------
    TypeError
        If `mode` is not a string.
    ValueError
        If `mode` is neither "stdout" nor "dicts".

    Examples
    --------
    >>> import normfast as nf
    >>> config = nf.show_config(mode="dicts")
    >>> list(config)
    ['version', 'code_path', 'code_paths', 'threads', 'pool', 'cuda', 'compiler', 'numpy']
    >>> config["code_path"] in config["code_paths"]
    True
    """
    if mode not in ("stdout", "dicts"):
        kind = ValueError if isinstance(mode, str) else TypeError
        raise kind(f"show_config: mode must be 'stdout' or 'dicts', got {mode!r}")

    # Found only when asked for: reading package metadata would take longer than the rest of the import.
    from . import __version__

    core = _core.config()
    config: dict[str, Any] = {
        "version": __version__,
        "code_path": core["code_path"],
        "code_paths": core["code_paths"],
        "threads": core["threads"],
        "pool": core["pool"],
        "cuda": _cuda(),
        "compiler": core["compiler"],
        "numpy": np.__version__,
    }
    if mode == "dicts":
        return config
    for key, value in config.items():
        print(f"{key + ':':<12}{_text(value)}")
    return None


def _cuda() -> dict[str, Any]:
    """What is known of CUDA: imports its module, which nothing else does before the first array on a device."""
    try:
        from ._cuda import config
    except ModuleNotFoundError:
        reason = "this build has no CUDA backend (NORMFAST_CUDA)"
        return {"built": False, "available": False, "reason": reason}
    except ImportError as error:
        return {"built": True, "available": False, "reason": str(error)}
    found = config()
    return {"built": True, "available": bool(found["devices"]), **found}


def _text(value: object) -> str:
    """A value as one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or "none"
    return str(value)
