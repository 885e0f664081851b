"""How many instructions does a call take? ``python -m benchmarks.instructions [check|write] [--baseline FILE]``

Inside the caches the time of a call follows its instructions, and their number does not depend on what else runs on
the machine. So a slower kernel is noticed where times would drown in noise. ``check`` compares with a stored baseline
and fails above +3 %; ``write`` makes that baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import callgrind, machine
from .native import HERE
from .shapes import DTYPES, OPS, Case

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BASELINE = HERE / "results" / "instructions.json"
TOLERANCE = 3  # percent
WRITE = "python -m benchmarks.instructions write"
_STYLES = {"above": "bold red", "missing": "bold red", "below": "green", "gone": "dim"}


def cases() -> list[Case]:
    """What is counted: every op and layout, some in every dtype.

    x and the result fit into 512 KB together. Kernels look at the size of the second-level cache, and a count should
    not depend on whether it is 512 KB or 2 MB.
    """
    token, sequence, batch, short = (1, 768), (32, 768), (64, 768), (2048, 16)
    rows = {
        "layer_norm": (token, (8, 768), batch, short),
        "rms_norm": (token, batch, short),
        "layer_norm_backward": (token, sequence, batch, short),
        "rms_norm_backward": (sequence, short),
    }
    image, last, small = (4, 32, 14, 14), (4, 14, 14, 32), (4, 128, 7, 7)
    found = [Case(op, shape) for op, shapes in rows.items() for shape in shapes]
    found += [Case(op, (4, 24, 14, 14), axis=1) for op in ("layer_norm", "layer_norm_backward")]
    for op in (op for op in OPS if op.startswith(("batch", "group", "instance"))):
        groups = 8 if op.startswith("group") else 0
        found += [Case(op, shape, groups=groups) for shape in (image, small)]
        found.append(Case(op, last, channel_axis=-1, groups=groups))
        if op.startswith("batch"):
            found.append(Case(op, (128, 256)))
    for dtype in DTYPES[1:]:
        found += [Case(op, sequence, dtype) for op in ("layer_norm", "layer_norm_backward")]
        found += [Case(op, image, dtype) for op in ("batch_norm", "batch_norm_backward")]
    return found


@dataclass(frozen=True)
class Line:
    """One case: instructions per call in the baseline and now; None where there are none."""

    label: str
    before: int | None
    now: int | None

    @property
    def verdict(self) -> str:
        if self.now is None:
            return "gone"
        if self.before is None:
            return "missing"
        change = 100 * (self.now - self.before)  # of integers, so that the limit itself is exact
        if change > TOLERANCE * self.before:
            return "above"
        return "below" if change < -TOLERANCE * self.before else ""

    @property
    def fails(self) -> bool:
        return self.verdict in ("above", "missing")


def compare(before: dict[str, int], now: dict[str, int]) -> list[Line]:
    """All cases of either, those that are counted now in their order first."""
    return [Line(label, before.get(label), now.get(label)) for label in [*now, *(before.keys() - now.keys())]]


def build_key(facts: dict[str, Any]) -> str:
    """Counts are those of a compiler's code for one kind of CPU: each pair of these has a baseline of its own."""
    return f"{facts['compiler']}, {facts['code_path']}"


def load(file: Path) -> dict[str, Any]:
    """The baselines by build; none where there is no file."""
    return json.loads(file.read_text())["builds"] if file.exists() else {}


def write(file: Path, counts: callgrind.Counts) -> None:
    """Replace the baseline of this build and keep those of others."""
    builds = load(file) | {build_key(counts.facts): {**counts.facts, "instructions_per_call": counts.calls}}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"schema": 1, "builds": builds}, indent=1) + "\n")


def advice(lines: list[Line]) -> Iterator[str]:
    """What to do, in words."""
    labels = {verdict: [line.label for line in lines if line.verdict == verdict] for verdict in _STYLES}
    if labels["above"]:
        yield f"More than {TOLERANCE} % above the baseline: {', '.join(labels['above'])}."
        yield f"If that is intended, `{WRITE}` and give the reason in the commit message."
    if labels["missing"]:
        yield f"Not in the baseline: {', '.join(labels['missing'])}. `{WRITE}` adds it."
    if labels["below"]:
        yield f"{len(labels['below'])} more than {TOLERANCE} % below the baseline: `{WRITE}` keeps what was gained."
    if labels["gone"]:
        yield f"In the baseline only: {', '.join(labels['gone'])}. `{WRITE}` drops it."


def _table(title: str, lines: list[Line], sizes: dict[str, int]) -> Table:
    from rich.table import Table

    table = Table("case", title=title, title_justify="left")
    for heading in ("baseline", "now", "now, per element", "change"):
        table.add_column(heading, justify="right")
    for line in lines:
        now, before, each, change = line.now, line.before, "-", line.verdict
        if now is not None and line.label in sizes:
            each = f"{now / sizes[line.label]:.3f}"
        if now is not None and before:
            change = f"{100 * (now / before - 1):+.2f} %"
        texts = ("-" if value is None else f"{value:,}" for value in (before, now))
        table.add_row(line.label, *texts, each, change, style=_STYLES.get(line.verdict))
    return table


def _check(counts: callgrind.Counts, file: Path, required: bool, console: Console) -> int:
    key, builds = build_key(counts.facts), load(file)
    stored = builds.get(key)
    lines = compare(stored["instructions_per_call"] if stored else {}, counts.calls)
    sizes = {case.label: case.size for case in cases()}
    console.print(_table(f"Instructions per call ({key})", lines, sizes))
    if stored is None:
        text = f"No baseline for {key} in {file}; it has {'; '.join(builds) or 'none'}. `{WRITE}` adds one."
        console.print(text, style="bold red" if required else "bold", markup=False, highlight=False)
        return 2 if required else 0
    for name in counts.facts.keys() - {"compiler", "code_path"}:
        if counts.facts[name] != stored.get(name):
            console.print(f"The baseline was counted with {name} {stored.get(name)}, this is {counts.facts[name]}.")
    for text in advice(lines):
        console.print(text, markup=False, highlight=False)
    failed = sum(line.fails for line in lines)
    verdict = f"{failed} of {len(lines)} cases fail." if failed else f"{len(counts.calls)} cases, none above the limit."
    console.print(verdict, style="bold red" if failed else "bold")
    return 1 if failed else 0


def main() -> int:
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("command", nargs="?", default="check", choices=("check", "write"))
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE")
    parser.add_argument(
        "--require",
        action="store_true",
        default=bool(os.environ.get("CI")),
        help="check: fail where this compiler and code path have no baseline (default where CI is set)",
    )
    options = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    wanted = cases()
    done: list[str] = []
    try:
        with console.status("starting valgrind") as status:

            def arrived(label: str) -> None:
                done.append(label)
                status.update(f"{len(done)} of {len(wanted)}: {label}")

            counts = callgrind.count(wanted, arrived)
    except callgrind.CannotCount as error:
        console.print(str(error), style="bold red", markup=False, highlight=False)
        return 2
    counts.facts["second_level_cache"] = machine.machine()["caches"].get("L2", "unknown")
    if options.command == "check":
        return _check(counts, options.baseline, options.require, console)
    write(options.baseline, counts)
    text = f"{len(counts.calls)} cases written to {options.baseline} for {build_key(counts.facts)}."
    console.print(text, markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
