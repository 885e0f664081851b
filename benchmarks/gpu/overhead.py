# SPDX-License-Identifier: BSD-3-Clause

"""Small arrays: what a call costs on the host, and what a call costs in a CUDA graph that is replayed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

import normfast as nf

from .cases import Case
from .peers import Compiling, Lacks, eager
from .problem import Problem

F = torch.nn.functional
BATCH, BATCHES = 200, 25  # few enough calls for the queue of launches
IN_GRAPH = 20
SHAPE = (8, 768)
GRAPH_CASES = [
    Case("layer_norm", "forward", (8, 768), "float16"),
    Case("layer_norm", "backward", (8, 768), "float16"),
    Case("rms_norm", "forward", (512, 4096), "bfloat16"),
    Case("rms_norm", "backward", (512, 4096), "bfloat16"),
    Case("group_norm", "forward", (2, 320, 64, 64), "float16", 32),
    Case("group_norm", "backward", (2, 320, 64, 64), "float16", 32),
    Case("group_norm", "forward", (2, 1280, 16, 16), "float16", 32),
    Case("batch_norm", "forward", (8, 64, 28, 28), "float16"),
    Case("batch_norm", "backward", (8, 64, 28, 28), "float16"),
]


def calls(device: str) -> list[dict]:
    """Wall time per call on (8, 768) float32, without waiting for the device after each."""
    host = np.random.default_rng(1).standard_normal(SHAPE, dtype=np.float32)
    vectors = np.ones(SHAPE[1], np.float32), np.zeros(SHAPE[1], np.float32)
    rows: list[dict] = []
    libraries: list[tuple[str, Callable[[np.ndarray], Any]]] = [("torch", lambda a: torch.from_numpy(a).to(device))]
    if device != "cpu":
        with contextlib.suppress(Exception):
            import cupy

            libraries.append(("cupy", cupy.asarray))
        with contextlib.suppress(Exception):
            import jax

            if jax.default_backend() in ("gpu", "cuda"):
                libraries.append(("jax", jax.device_put))
    libraries.append(("DeviceArray", nf.cuda.to_device))
    for name, put in libraries:
        arrays = [put(a) for a in (host, *vectors)]
        for label, call in _calls_of(name, *arrays).items():
            try:
                rows.append({"call": label, "library": name, "us": 1e6 * _wall(call, device)})
            except Exception as error:
                print(f"  ! {label}: {type(error).__name__}: {error}", flush=True)
    return rows


def _calls_of(name: str, x: Any, w: Any, b: Any) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    if name == "torch":
        out = torch.empty_like(x)
        found = {
            "torch.empty_like(x)": lambda: torch.empty_like(x),
            "torch.add(x, x)": lambda: torch.add(x, x),
            "F.layer_norm(x, (n,), w, b)": lambda: F.layer_norm(x, SHAPE[1:], w, b),
            "F.rms_norm(x, (n,), w)": lambda: F.rms_norm(x, SHAPE[1:], w),
        }
    elif name == "cupy":
        import cupy

        out = cupy.empty_like(x)
        found = {"cupy.empty_like(x)": lambda: cupy.empty_like(x), "cupy.add(x, x)": lambda: cupy.add(x, x)}
    elif name == "jax":
        out = None
        found = {"x + x (jax)": lambda: x + x}
    else:
        out = nf.cuda.to_device(np.zeros(SHAPE, np.float32))
    _, mean, rstd = nf.layer_norm(x, w, b, return_stats=True)
    found[f"nf.layer_norm(x, w, b), {name}"] = lambda: nf.layer_norm(x, w, b)
    if out is not None:
        found[f"nf.layer_norm(x, w, b, out=out), {name}"] = lambda: nf.layer_norm(x, w, b, out=out)
        found[f"nf.rms_norm(x, w, out=out), {name}"] = lambda: nf.rms_norm(x, w, out=out)
        found[f"nf.batch_norm(x, b, w, w, b, out=out), {name}"] = lambda: nf.batch_norm(x, b, w, w, b, out=out)
    found[f"nf.layer_norm_backward(x, x, mean, rstd, w), {name}"] = lambda: nf.layer_norm_backward(x, x, mean, rstd, w)
    return found


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _wall(call: Callable[[], Any], device: str) -> float:
    batch, batches = (BATCH, BATCHES) if device != "cpu" else (1, 3)  # on the host only to try the table
    for _ in range(batch):
        call()
    _finish()
    values = []
    gc.disable()
    try:
        for _ in range(batches):
            began = perf_counter()
            for _ in range(batch):
                call()
            values.append((perf_counter() - began) / batch)
            _finish()
    finally:
        gc.enable()
    return median(values)


def graphs(device: str) -> list[dict]:
    """Time per call in a replayed graph of some calls, one after the other; an empty kernel for comparison."""
    if device == "cpu":
        return []
    one, side = torch.zeros(1, device=device), torch.cuda.Stream()
    rows = [{"call": "fill one cell", "contender": "torch", "us": 1e6 * _replay(lambda i: one.zero_(), side)}]
    for case in GRAPH_CASES:
        problem = Problem(case, device, 1 << 20)
        wanted: dict[str, Callable[[int], Any]] = {"normfast": problem.normfast()}
        # PyTorch runs a backward pass on the stream of its forward pass.
        torch.cuda.synchronize()
        with contextlib.suppress(Lacks), torch.cuda.stream(side):
            wanted["torch"] = eager(problem, Compiling(0)).call
        torch.cuda.synchronize()
        for name, call in wanted.items():
            try:
                seconds = _replay(lambda i, call=call, sets=problem.sets: call(i % sets), side)
            except Exception as error:
                print(f"  ! graph of {name}, {case.label}: {type(error).__name__}: {error}", flush=True)
                continue
            rows.append({"call": f"{case.label}, {name}", "contender": name, "us": 1e6 * seconds})
    return rows


def _replay(call: Callable[[int], Any], side: Any) -> float:
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = [call(i) for i in range(IN_GRAPH)]
    values = []
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        graph.replay()
    for _ in range(15):
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        values.append(1e-3 * start.elapsed_time(end) / 10 / IN_GRAPH)
    del kept
    return median(values)
