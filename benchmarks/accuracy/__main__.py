"""`python -m benchmarks.accuracy`: measure and report; `report`: tables and charts of the stored figures; `input`: one
sample again, as the tables name it."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
from pathlib import Path

import normfast as nf

from ..machine import machine, repository
from . import report, sweep
from .inputs import DTYPES, OPS, SIZES, samples
from .libraries import installed

ROOT = Path(__file__).parents[2]
RESULTS = Path("benchmarks") / "results" / "accuracy.json"


def measure(most: int, processes: int) -> dict:
    from rich.progress import track

    libraries = installed()
    for name in set(sweep.LIBRARIES) - set(libraries):
        print(f"{name} is not installed; its column is left out.")
    start = datetime.datetime.now(datetime.timezone.utc)
    content = {
        "schema": 1,
        "date": start.isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.accuracy", *sys.argv[1:]]),
        "machine": machine(),
        "normfast": repository() | {"config": nf.show_config(mode="dicts")},
        "libraries": libraries,
        "seed": "of each sample: its number and the CRC-32 of its label",
    }
    content |= sweep.run(list(libraries), most, processes, functools.partial(track, description="measuring"))
    content["seconds"] = round((datetime.datetime.now(datetime.timezone.utc) - start).total_seconds())
    return content


def again(label: str) -> None:
    """Measure the sample of that label."""
    for op in OPS:
        for dtype in DTYPES:
            for n in SIZES:
                if label.startswith(f"{op} ") and dtype in label:
                    found = next((s for _, s in samples(op, dtype, n) if s.label == label), None)
                    if found is not None:
                        for name, error in sweep.subject(found).items():
                            print(f"{name}: {error.ulps:.3f} ulp, {error.norm:.2e} in norm")
                        return
    sys.exit(f"no sample is called {label!r}; labels stand in the tables and in {RESULTS}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("run", "report", "input"), default="run")
    parser.add_argument("label", nargs="?", help="input: the label of a sample")
    parser.add_argument("--most", type=float, default=1e7, help="run: cells of the largest reductions")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md, docs and benchmarks/results lie")
    options = parser.parse_args()
    if options.what == "input":
        again(options.label or "")
        return
    path = options.root / RESULTS
    if options.what == "run":
        content = measure(int(options.most), options.processes)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    for written in report.write(json.loads(path.read_text(encoding="utf-8")), options.root):
        print(f"written: {written}")


if __name__ == "__main__":
    main()
