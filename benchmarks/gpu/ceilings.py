# SPDX-License-Identifier: BSD-3-Clause

"""What the device gives to anybody, before the cells: passes over memory, the reach of the L2 cache, room for clusters.

Rows of a table: what, value, unit. Each cell has ceilings of its own besides, over its own arrays.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from .peers import LIMIT_STREAMS
from .timing import Contender, Timer

LARGE = 1 << 30  # bytes of an array, far beyond every cache
PARTS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # of the L2 cache: the bytes that a copy goes over again and again
ROUNDS, SECONDS = 7, 0.3


def passes(device: str, l2_bytes: int) -> list[dict]:
    large = LARGE if device != "cpu" else 1 << 20
    far = rates(device, large, sets=2)
    names = {"copy": "one array read, one written (copy)", "add": "two arrays read, one written (add)"}
    rows = [_row(f"{names[name]}, {large >> 20} MB each", value, "GB/s") for name, value in far.items()]
    near = {part: rates(device, max(4096, int(part * l2_bytes) // 2), sets=1)["copy"] for part in PARTS}
    rows += [_row(f"copy again and again, {part:g} of the L2 cache", value, "GB/s") for part, value in near.items()]
    return [*rows, _row("L2 cache that a copy can use", reach(near, far["copy"]) * l2_bytes / 1e6, "MB")]


def _row(what: str, value: float, unit: str) -> dict:
    return {"call": what, "value": value, "unit": unit}


def rates(device: str, nbytes: int, sets: int) -> dict[str, float]:
    """GB/s, what is read and what is written counted, over sets of arrays of so many bytes."""
    x, y, out = ([torch.empty(nbytes // 4, device=device).normal_() for _ in range(sets)] for _ in range(3))
    contenders = [
        Contender("copy", lambda i: out[i].copy_(x[i])),
        Contender("add", lambda i: torch.add(x[i], y[i], out=out[i])),
    ]
    Timer(sets, device).measure(contenders, ROUNDS, SECONDS)
    return {one.name: LIMIT_STREAMS[one.name] * nbytes / one.summary()["us"] / 1e3 for one in contenders}


def reach(near: dict[float, float], far: float) -> float:
    """The largest part of the cache that is faster by half than memory, as far as the fastest is; 0 if none is."""
    middle = (max(near.values()) + far) / 2
    return max((part for part, rate in near.items() if rate >= middle and rate > 1.2 * far), default=0.0)


def clusters() -> list[dict]:
    """What clusters.cu says. Raises where it cannot be compiled or run."""
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc: cluster occupancy is not measured")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "clusters"
        major, minor = torch.cuda.get_device_capability()
        source = Path(__file__).with_name("clusters.cu")
        subprocess.run([nvcc, f"-arch=sm_{major}{minor}", source, "-o", program], check=True, capture_output=True)
        return table(subprocess.run([program], check=True, capture_output=True, text=True, timeout=60).stdout)


def table(text: str) -> list[dict]:
    rows = []
    for line in text.splitlines():
        blocks, threads, kib, count = map(int, line.split())
        what = f"clusters of {blocks} blocks at once, {threads} threads and {kib} KiB of shared memory each"
        rows.append(_row(what, float(count), "clusters"))
    return rows
