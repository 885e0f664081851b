"""A run of the board: start the worker processes, follow them, collect their cells.

Two ways of measuring:

recycled   results go to memory that has been written before. The C library is told to keep freed memory instead of
           giving it back to the system, so that PyTorch, JAX and NumPy get the same pages again: compares kernels.
installed  the default allocator: a user's call, with the page faults of fresh memory.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import peers
from .machine import machine, repository
from .native import HERE
from .shapes import Case

MODES = ("recycled", "installed")
SCHEMA = 1

# glibc: never map large blocks on their own, never give the heap's end back, one heap for all threads (the heaps of
# other threads cannot hold blocks above 64 MB and fall back to mapping). These variables do what mallopt does, from the
# start of the process.
_KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 46),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
}


class RunFailed(Exception):
    """The run cannot go on; the text says why."""


@dataclass
class Plan:
    cases: list[Case]
    threads: list[int]
    modes: list[str]
    peers: list[str]
    check_only: bool = False
    rounds: int = 11
    budget: float = 2.0
    huge_pages: bool = False

    @property
    def total(self) -> int:
        return len(self.cases) * len(self.threads) * len(self.modes)


@dataclass
class Listener:
    """How a run shows itself; all of it optional."""

    doing: Callable[[str], None] = lambda text: None
    cell: Callable[[dict], None] = lambda cell: None
    ready: Callable[[dict], None] = lambda message: None


@dataclass
class Run:
    """What a run leaves behind, as written to JSON."""

    content: dict = field(default_factory=dict)

    def disagreements(self) -> list[str]:
        return [
            f"{name}: {cell['label']} ({cell['mode']}, {cell['threads']} thread{'s' * (cell['threads'] > 1)}): {reason}"
            for cell in self.content["cells"]
            for name, reason in cell["disagree"].items()
        ]


def environment(mode: str, threads: int, names: list[str], huge_pages: bool) -> dict[str, str]:
    """The environment of a worker."""
    variables = dict(os.environ)
    variables |= {"OMP_NUM_THREADS": str(threads), "NORMFAST_NUM_THREADS": str(threads)}
    for name in names:
        variables |= peers.load(name).environment(threads)
    if mode == "recycled":
        variables |= _KEEP_MEMORY
        if huge_pages:
            variables["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    return variables


def new(plan: Plan, command: str) -> Run:
    """An empty run with everything that is known before it begins."""
    return Run(
        {
            "schema": SCHEMA,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "machine": machine(),
            "normfast": repository(),
            "settings": {"rounds": plan.rounds, "budget_s": plan.budget, "huge_pages": plan.huge_pages},
            "peers": {},
            "lacking": {},
            "cells": [],
        }
    )


def execute(plan: Plan, result: Run, log: Path, listener: Listener) -> None:
    """Fill the run, cell by cell; what is there when it fails is worth keeping."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:
        for threads in plan.threads:
            for mode in plan.modes:
                _one_worker(plan, mode, threads, result, listener, errors, log)


def _one_worker(plan: Plan, mode: str, threads: int, result: Run, listener: Listener, errors, log: Path) -> None:
    orders = {
        "threads": threads,
        "mode": mode,
        "check_only": plan.check_only,
        "rounds": plan.rounds,
        "budget": plan.budget,
        "peers": plan.peers,
        "cases": [asdict(case) for case in plan.cases],
    }
    print(f"\n=== {mode}, {threads} threads", file=errors, flush=True)
    worker = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        cwd=HERE.parent,
        env=environment(mode, threads, plan.peers, plan.huge_pages),
    )
    doing, ended = "starting", False
    try:
        with contextlib.suppress(BrokenPipeError), worker.stdin:  # a worker that is dead already says why in the log
            json.dump(orders, worker.stdin)
        for line in worker.stdout:
            message = json.loads(line)
            event = message.pop("event")
            if event == "doing":
                doing = message["text"]
                listener.doing(f"{mode}, {threads} thread{'s' * (threads > 1)}: {doing}")
            elif event == "ready":
                result.content["peers"] |= message["versions"]
                result.content["lacking"] |= message["lacking"]
                result.content["normfast"]["config"] = message["config"]
                if message["limits"]:
                    result.content["limits_missing"] = message["limits"]
                listener.ready(message)
            elif event == "cell":
                cell = message["cell"] | {"mode": mode, "threads": threads}
                cell["label"] = Case(**{**cell["case"], "shape": tuple(cell["case"]["shape"])}).label
                result.content["cells"].append(cell)
                listener.cell(cell)
            else:
                ended = True
    except BaseException:
        worker.kill()
        raise
    finally:
        worker.wait()
    if worker.returncode or not ended:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RunFailed(f"The worker ({mode}, {threads} threads) ended with {worker.returncode} at: {doing}\n{tail}")
