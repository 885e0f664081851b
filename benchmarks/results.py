"""Figures derived from the cells of a run, and reading and writing runs. Tables and charts are made from these."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

from .agreement import inaccurate
from .board import SCHEMA
from .peers import NAMES, SUBJECT
from .shapes import Case

FRESH_BYTES = 32 << 20  # glibc maps larger blocks anew for every call
PAGE = 4096
OTHERS_CPUS = 0.15  # used by other processes, on average over a cell, above which its figures are in doubt


def duration(seconds: float) -> str:
    seconds = float(f"{seconds:.3g}")  # first, since it may take the next unit: 999.6 us is 1 ms
    for unit, scale in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


@dataclass(frozen=True)
class Cell:
    """One line of the board: a case, a way of measuring, a number of threads."""

    case: Case
    mode: str
    threads: int
    raw: dict

    @property
    def seconds(self) -> float:
        return self.raw["results"][SUBJECT]["seconds"]

    @property
    def gbs(self) -> float:
        return self.raw["results"][SUBJECT]["gbs"]

    @property
    def spread(self) -> float:
        return self.raw["results"][SUBJECT]["spread"]

    @property
    def limit(self) -> float | None:
        """The fastest of the streaming limits in GB/s."""
        return max((one["gbs"] for one in self.raw["limits"].values()), default=None)

    def percent(self, name: str = SUBJECT) -> float | None:
        """Least traffic of this contender as a share of the limit."""
        return 100 * self.raw["results"][name]["gbs"] / self.limit if self.limit else None

    @property
    def ratios(self) -> dict[str, float]:
        """Time of each peer over the time of normfast."""
        return {name: one["ratio"] for name, one in self.raw["results"].items() if name != SUBJECT}

    @property
    def best_peer(self) -> str | None:
        return min(self.ratios, key=self.ratios.__getitem__, default=None)

    def noisy(self, name: str) -> bool:
        """Fewer quiet samples than wanted, for this contender or for normfast, or a busy machine."""
        return self.disturbed or self.raw["results"][name]["noisy"] or self.raw["results"][SUBJECT]["noisy"]

    @property
    def disturbed(self) -> bool:
        """Other processes used CPUs while this cell was measured."""
        return (self.raw.get("others_cpus") or 0.0) > OTHERS_CPUS

    def faulting(self, name: str) -> bool:
        """Recycled outputs were asked for, but this contender's calls touch fresh pages."""
        allowed = 1 + 0.02 * self.case.nbytes / PAGE
        return self.mode == "recycled" and self.raw["results"][name]["faults_per_call"] > allowed


class Board:
    """A run as the tables and charts see it."""

    def __init__(self, content: dict) -> None:
        if content.get("schema") != SCHEMA:
            raise ValueError(f"this is not a result of the board of schema {SCHEMA}")
        self.content = content
        self.cells = [
            Cell(Case(**{**raw["case"], "shape": tuple(raw["case"]["shape"])}), raw["mode"], raw["threads"], raw)
            for raw in content["cells"]
            if "results" in raw
        ]
        seen = set(content["peers"]) | set(content["lacking"])
        self.peers = [name for name in NAMES if name in seen]

    def groups(self) -> Iterator[tuple[str, int, list[Cell]]]:
        """Cells that belong into one table: one way of measuring, one number of threads."""
        for key in dict.fromkeys((cell.mode, cell.threads) for cell in self.cells):
            yield *key, [cell for cell in self.cells if (cell.mode, cell.threads) == key]

    def inaccurate(self) -> list[str]:
        """Contenders that were timed although a sum of theirs is far off."""
        found = {
            f"{name}, {cell.case.label}: error {error:.0%}": None
            for cell in self.cells
            for name, error in cell.raw["errors"].items()
            if inaccurate(cell.case.dtype, error)
        }
        return list(found)

    def machine_line(self) -> str:
        machine, normfast = self.content["machine"], self.content["normfast"]
        caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
        path = normfast.get("config", {}).get("code_path", "?")
        commit = (normfast["commit"] or "unknown")[:10] + ("+" if normfast["modified"] else "")
        return (
            f"{machine['cpu']}, {machine['cpus']} CPUs, {caches}; normfast {self.content['peers'].get(SUBJECT, '')} "
            f"at {commit}, code path {path}; {self.content['date'][:10]}"
        )

    def versions_line(self) -> str:
        present = [f"{n} {self.content['peers'][n]}" for n in self.peers if n in self.content["peers"]]
        absent = [f"{n} ({why})" for n, why in self.content["lacking"].items() if n not in self.content["peers"]]
        return ", ".join(present or ["none"]) + (f"; without {', '.join(absent)}" if absent else "")


def bytes_of(text: str) -> int:
    """The size of a cache as Linux writes it: 32K, 1M."""
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    return int(text.rstrip("KMG") or 0) * scale


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs)) if logs else None


@dataclass(frozen=True)
class Summary:
    """One peer (or the best of all) over the cells of a group."""

    name: str
    cells: int
    mean: float  # geometric
    least: float
    least_at: str
    slower: int  # cells in which the peer is faster


def summarise(cells: list[Cell], peers: list[str]) -> list[Summary]:
    best = {id(c): c.ratios[c.best_peer] for c in cells if c.best_peer}
    rows = [("best peer", [(best[id(c)], c) for c in cells if id(c) in best])]
    rows += [(name, [(c.ratios[name], c) for c in cells if name in c.ratios]) for name in peers]
    large = [(c.ratios["torch"], c) for c in cells if "torch" in c.ratios and c.case.nbytes > FRESH_BYTES]
    rows.append(("torch, outputs above 32 MB", large))
    result = []
    for name, values in rows:
        if values:
            least, at = min(values, key=lambda value: value[0])
            ratios = [ratio for ratio, _ in values]
            mean = geometric_mean(ratios)
            result.append(Summary(name, len(values), mean, least, at.case.label, sum(r < 1 for r in ratios)))
    return result


def board_path(text: str) -> Path:
    """Where a board lies, for a command line. Its log, tables and pictures take its name without the ending."""
    path = Path(text)
    if path.suffix != ".json":
        raise ArgumentTypeError(f"a board's name ends in .json: {path.name}.json")
    return path


def save(content: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def load(path: Path) -> dict:
    return json.loads(path.read_text())
