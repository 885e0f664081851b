# SPDX-License-Identifier: BSD-3-Clause

"""A run of the board: cell by cell, the most important first, until the time is over; kept after every cell."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import normfast as nf

from ..agreement import Disagreement
from . import agreement, ceilings, machine, overhead
from .cases import Case, cases
from .peers import LIMIT_STREAMS, PEERS, Compiling, Lacks, limits
from .problem import Problem
from .timing import Contender, Timer

SCHEMA = "gpu-1"
ROUNDS, BUDGET = 15, 1.2  # samples, seconds per cell
COMPILERS = 0.22  # share of the time that compilers may take


class Board:
    def __init__(self, out: Path, minutes: float, device: str, commit: str | None, peers: list[str]) -> None:
        self.out, self.device, self.peers = out, device, peers
        self.end = perf_counter() + 60 * minutes
        self.compiling = Compiling(60 * minutes * COMPILERS)
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "rehearsal": device == "cpu",
            **machine.facts(device, commit),
            "settings": {"minutes": minutes, "rounds": ROUNDS, "budget_s": BUDGET},
            "ceilings": [],
            "clusters": [],
            "cells": [],
            "overhead": [],
            "graphs": [],
            "not_reached": [],
            "troubles": [],
        }

    @property
    def left(self) -> float:
        return self.end - perf_counter()

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.out)

    def trouble(self, where: str, error: BaseException) -> None:
        text = f"{where}: {type(error).__name__}: {error}".splitlines()[0][:300]
        self.content["troubles"].append(text)
        print("  !", text, flush=True)

    def run(self, chosen: list[Case], tell: Callable[[str], None]) -> None:
        """Ceilings, twenty headline cells, then calls and graphs, then the rest."""
        self.save()
        torch.set_grad_enabled(False)
        torch.manual_seed(7)
        self._table("ceilings", lambda: ceilings.passes(self.device, self.content["gpu"]["l2_bytes"]), tell)
        if self.device != "cpu":
            self._table("clusters", ceilings.clusters, tell)
        for number, case in enumerate(chosen):
            if number == min(20, len(chosen) // 2):
                self._table("overhead", lambda: overhead.calls(self.device), tell)
                self._table("graphs", lambda: overhead.graphs(self.device), tell)
            if self.left < 3:
                self.content["not_reached"] = [c.label for c in chosen[number:]]
                break
            try:
                cell = self.cell(case)
            except Exception as error:  # out of memory, a kernel that failed: the others still count
                self.trouble(case.label, error)
                if self._lost():
                    self.content["not_reached"] = [c.label for c in chosen[number + 1 :]]
                    break
            else:
                self.content["cells"].append(cell)
                tell(line(cell))
            gc.collect()
            if self.device != "cpu":
                torch.cuda.empty_cache()
            self.save()
        self.content["clocks_after"] = machine.nvidia_smi() if self.device != "cpu" else {}
        self.save()

    def _table(self, name: str, rows: Callable[[], list[dict]], tell: Callable[[str], None]) -> None:
        try:
            self.content[name] = rows()
        except Exception as error:
            self.trouble(name, error)
        for row in self.content[name]:
            value = f"{row['us']:8.2f} us" if "us" in row else f"{row['value']:8.0f} {row['unit']}"
            tell(f"{name:<9} {row['call']:<48} {value}")
        self.save()

    def _lost(self) -> bool:
        if self.device == "cpu":
            return False
        try:
            torch.cuda.synchronize()
        except Exception as error:
            self.trouble("the device is lost", error)
            return True
        return False

    def cell(self, case: Case) -> dict:
        problem = Problem(case, self.device, self.content["gpu"]["l2_bytes"])
        contenders, lacks, errors = [Contender("normfast", problem.normfast())], {}, {}
        for name in self.peers:
            try:
                contenders.append(PEERS[name](problem, self.compiling))
            except Lacks as why:
                lacks[name] = str(why)
            except Exception as error:
                lacks[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        for one in list(contenders):
            try:
                errors[one.name] = agreement.check(one.name, problem, _tensors(one.call(0)))
            except Disagreement as error:
                self.trouble(f"{case.label}: {one.name} DISAGREES", error)
                lacks[one.name] = f"disagrees: {error}"
                contenders.remove(one)
            except Exception as error:
                self.trouble(f"{case.label}: {one.name}", error)
                lacks[one.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                contenders.remove(one)
        passes = limits(problem)
        timer = Timer(problem.sets, self.device)
        timer.measure(contenders + passes, ROUNDS, min(BUDGET, max(0.2, self.left - 2)))
        results = {one.name: one.summary() for one in contenders}
        for one in results.values():
            one["gbs"] = case.least_bytes / one["us"] / 1e3
        ceilings = {one.name: LIMIT_STREAMS[one.name] * case.nbytes / one.summary()["us"] / 1e3 for one in passes}
        return {
            "case": asdict(case),
            "label": case.label,
            "least_bytes": case.least_bytes,
            "sets": problem.sets,
            "results": results,
            "ceilings": ceilings,
            "errors": errors,
            "lacks": lacks,
        }


def _tensors(result: Any) -> Any:
    """Of JAX as of PyTorch."""
    if isinstance(result, tuple | list):
        return tuple(_tensors(r) for r in result)
    return result if result is None or isinstance(result, torch.Tensor) else torch.from_dlpack(result)


def line(cell: dict) -> str:
    own = cell["results"].get("normfast")
    if own is None:
        return f"{cell['label']:<58} normfast: {cell['lacks'].get('normfast')}"
    copy = max(cell["ceilings"][name] for name in ("copy", "neg"))
    others = "  ".join(f"{n} {r['us']:.1f}" for n, r in cell["results"].items() if n != "normfast")
    return f"{cell['label']:<58} {own['us']:9.1f} us {own['gbs']:6.0f} GB/s {100 * own['gbs'] / copy:4.0f} %  {others}"


def choose(patterns: list[str] | None) -> list[Case]:
    return [c for c in cases() if not patterns or any(p in c.label for p in patterns)]


def file_name(content: dict) -> str:
    """gpu-<device>-<short commit>.json"""
    name = content["gpu"]["name"].lower().replace("nvidia", "").split()
    return f"gpu-{'-'.join(name) or 'unknown'}-{(content['normfast']['commit'] or 'unknown')[:10]}.json"


def emulated() -> bool:
    """Is the device of this build of normfast the host's memory? Then it can only be a rehearsal."""
    return any(device["name"] == "host memory" for device in nf.show_config("dicts")["cuda"]["devices"])


def prepare(rehearse: bool) -> str:
    """The device of PyTorch; in a rehearsal the host, with the host build of the bindings behind normfast."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not rehearse:
        if not torch.cuda.is_available():
            raise SystemExit("This build of PyTorch sees no CUDA device; the board needs one.")
        return "cuda"
    import sys

    tests = Path(__file__).resolve().parents[2] / "tests"
    sys.path[:0] = [str(tests), str(tests / "cuda")]
    os.environ.setdefault("NORMFAST_CUDA_REHEARSAL", "1")
    import _device

    _device.missing()
    _device.Torch()
    return "cpu"
