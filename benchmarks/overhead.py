"""What a call costs before its kernel: nanoseconds per call on tiny arrays, next to NumPy's and PyTorch's own calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import normfast as nf

from .measure import measure
from .peers.base import Contender

SHAPES = ((2, 16), (8, 768))
PARTS = len(SHAPES)  # of the table, which tick by themselves


def _nothing() -> None:
    pass


def _calls(shape: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(1)
    x = rng.standard_normal(shape, dtype=np.float32)
    w, b = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)
    mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    out = np.empty_like(x)
    _, row_mean, rstd = nf.layer_norm(x, w, b, return_stats=True)

    def expression() -> Any:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5) * w + b

    calls = {
        "nf.layer_norm(x)": lambda: nf.layer_norm(x),
        "nf.layer_norm(x, w, b)": lambda: nf.layer_norm(x, w, b),
        "nf.layer_norm(x, w, b, out=out)": lambda: nf.layer_norm(x, w, b, out=out),
        "nf.rms_norm(x, w)": lambda: nf.rms_norm(x, w),
        "nf.batch_norm(x, m, v, w, b)": lambda: nf.batch_norm(x, mean, var, w, b),
        "nf.layer_norm_backward(x, x, mean, rstd, w)": lambda: nf.layer_norm_backward(x, x, row_mean, rstd, w),
        "np.empty_like(x)": lambda: np.empty_like(x),
        "np.add(x, x)": lambda: np.add(x, x),
        "np.add(x, x, out=out)": lambda: np.add(x, x, out=out),
        "NumPy expression": expression,
    }
    return calls | _torch_calls(x, w, b)


def _torch_calls(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> dict[str, Callable[[], Any]]:
    try:
        import torch
    except ModuleNotFoundError:
        return {}
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    functional = torch.nn.functional
    shape = x.shape[-1:]
    tx, tw, tb = (torch.from_numpy(a) for a in (x, w, b))

    def from_numpy() -> Any:
        tensors = (torch.from_numpy(a) for a in (x, w, b))
        tx, tw, tb = tensors
        return functional.layer_norm(tx, shape, tw, tb).numpy()

    return {
        "torch.add(tx, tx)": lambda: torch.add(tx, tx),
        "F.layer_norm(tx, shape, tw, tb)": lambda: functional.layer_norm(tx, shape, tw, tb),
        "F.rms_norm(tx, shape, tw)": lambda: functional.rms_norm(tx, shape, tw),
        "from_numpy, F.layer_norm, numpy": from_numpy,
    }


def table(rounds: int = 41, tick: Callable[[], None] = lambda: None) -> list[dict]:
    """One row per call and shape; ``ns`` has the cost of an empty call taken off."""
    nf.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        calls = {"": _nothing} | _calls(shape)
        contenders = {name: Contender(call, tuple) for name, call in calls.items()}
        series = measure(contenders, threads=1, rounds=rounds, budget=60.0, tick=tick)
        empty = series.pop("").summary()["seconds"]
        for name, one in series.items():
            summary = one.summary()
            rows.append(
                {
                    "call": name,
                    "shape": "x".join(map(str, shape)),
                    "ns": 1e9 * (summary["seconds"] - empty),
                    "spread": summary["spread"],
                    "samples": summary["samples"],
                    "rejected": summary["rejected"],
                }
            )
    return rows
