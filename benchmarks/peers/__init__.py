"""The contenders of the board, one file each. A peer that is not installed is shown as such, never dropped."""

from __future__ import annotations

from importlib import import_module

from .base import Contender, Lacks, Peer

__all__ = ["NAMES", "SUBJECT", "Contender", "Lacks", "Peer", "load"]

SUBJECT = "normfast"
_MODULES = {
    SUBJECT: "subject",
    "numpy": "numpy_",
    "torch": "torch_",
    "torch.compile": "torch_compile",
    "numba": "numba_",
    "jax": "jax_",
    "onnxruntime": "onnxruntime_",
    "onednn": "onednn",
}
NAMES = tuple(name for name in _MODULES if name != SUBJECT)


def load(name: str) -> Peer:
    """The peer of that name. The library behind it is imported later, by `Peer.open`."""
    return import_module(f"{__name__}.{_MODULES[name]}").PEER
