# SPDX-License-Identifier: BSD-3-Clause

"""Fast and accurate normalization for NumPy arrays.

Batch, layer, group, instance and RMS norm, forward and backward. Every function takes and returns arrays; nothing is
kept between calls. `normfast.reference` defines each of them in plain NumPy.

>>> import numpy as np
>>> import normfast as nf
>>> y = nf.layer_norm(np.random.default_rng(0).normal(5, 3, size=(8, 64)))
>>> bool(abs(y.mean()) < 1e-9), round(float(y.std()), 4)
(True, 1.0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._config import show_config
from ._pool import release_pool, set_pool_limit
from ._threads import get_num_threads, set_num_threads, threads
from .batch_norm import batch_norm, batch_norm_backward
from .group_norm import group_norm, group_norm_backward
from .instance_norm import instance_norm, instance_norm_backward
from .layer_norm import layer_norm, layer_norm_backward
from .rms_norm import rms_norm, rms_norm_backward

__all__ = [
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "cuda",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "reference",
    "release_pool",
    "rms_norm",
    "rms_norm_backward",
    "selftest",
    "set_num_threads",
    "set_pool_limit",
    "show_config",
    "threads",
]

if TYPE_CHECKING:
    from . import cuda, reference
    from .selftest import selftest

    __version__: str
else:

    def __getattr__(name):
        """Find on first use what would make every import slower."""
        if name == "__version__":
            from importlib.metadata import version

            value = version("normfast")
        elif name in ("cuda", "reference"):
            from importlib import import_module

            value = import_module(f".{name}", __name__)
        elif name == "selftest":
            from .selftest import selftest as value
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
