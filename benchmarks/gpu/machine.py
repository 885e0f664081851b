# SPDX-License-Identifier: BSD-3-Clause

"""Where the figures come from: GPU, driver, clocks, versions, commit."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from importlib import metadata

import torch

import normfast as nf

from ..machine import machine, repository

_ASKED = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
_VERSIONS = ("normfast", "torch", "triton", "jax", "jaxlib", "numpy", "numba", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")


def nvidia_smi() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_ASKED, (part.strip() for part in text.strip().splitlines()[0].split(",")), strict=False))


def gpu(device: str) -> dict:
    if device == "cpu":
        return {"name": "rehearsal", "l2_bytes": 1 << 20, "multiprocessors": 0, "runtime": None}
    p = torch.cuda.get_device_properties(0)
    driver = None
    with contextlib.suppress(Exception):
        driver = torch.cuda.driver_version()  # not in every version
    return {
        "name": p.name,
        "compute_capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": getattr(p, "L2_cache_size", 0) or (50 << 20),
        "memory_bytes": p.total_memory,
        "driver": driver,
        "runtime": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": nvidia_smi(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in (*_VERSIONS, "cupy-cuda13x", "cupy-cuda12x", "cupy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def facts(device: str, commit: str | None) -> dict:
    """What every result is stamped with. The commit may have to be told: there may be no repository."""
    state = repository()
    commit = commit or os.environ.get("NORMFAST_COMMIT") or None
    if commit:
        state = {"commit": commit, "modified": state["modified"] if state["commit"] == commit else None}
    config = nf.show_config("dicts")
    return {
        "gpu": gpu(device),
        "host": machine() | {"platform": platform.platform()},
        "normfast": state | {"version": config["version"], "cuda": config["cuda"]},
        "versions": versions(),
    }
