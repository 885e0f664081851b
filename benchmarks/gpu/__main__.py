# SPDX-License-Identifier: BSD-3-Clause

"""The command line: ``python -m benchmarks.gpu [run|report|list]``; without a word, ``run``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import cases, report

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
PEER_NAMES = report.PEER_NAMES
_COMMANDS = ("run", "report", "list")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="check results, then time them, as far as the time goes")
    run.add_argument("--minutes", type=float, default=3.5)
    run.add_argument("--only", action="append", help="part of a cell's label; may be given several times")
    run.add_argument("--peers", default=",".join(PEER_NAMES), help=f"of {', '.join(PEER_NAMES)}; or none")
    run.add_argument("--commit", help="what is measured, where there is no repository")
    run.add_argument("--out", type=Path, help="JSON file (default: gpu-<device>-<commit>.json in the folder)")
    run.add_argument("--into", type=Path, default=RESULTS, help="the folder (default: benchmarks/results)")
    run.add_argument("--rehearse", action="store_true", help="try the board on a machine without a GPU")
    shown = commands.add_parser("report", help="the table and the chart of a JSON file")
    shown.add_argument("file", type=Path)
    commands.add_parser("list", help="the cells, the most important first")
    return parser


def show(file: Path) -> None:
    """Write the Markdown, and the chart where matplotlib is installed, beside the JSON."""
    content = json.loads(file.read_text())
    file.with_suffix(".md").write_text(report.markdown(content))
    names = ["cells", "of copy", "best peer", *PEER_NAMES]
    for first, *row in [["geometric mean", *names], *report.summary(content)]:
        columns = (f"{value:>{max(10, len(name) + 2)}}" for value, name in zip(row, names, strict=True))
        print(f"{first:<26}{''.join(columns)}")
    for text in content["troubles"]:
        print(f"TROUBLE  {text}")
    try:
        from . import chart
    except ModuleNotFoundError as error:
        print(f"No chart: {error}. `python -m benchmarks.gpu report {file.name}` draws it elsewhere.")
    else:
        chart.draw(content, file.with_suffix(".png"))
    print(f"Written to {file.with_suffix('')}.json, .md, .png", flush=True)


def _run(options: argparse.Namespace) -> int:
    try:
        from . import board
    except ModuleNotFoundError as error:
        print(f"The board cannot run: {error}. It needs PyTorch, which it is compared with, and normfast.")
        return 2

    rehearse = options.rehearse or board.emulated()
    device = board.prepare(rehearse)
    peers = [] if options.peers == "none" else options.peers.split(",")
    if unknown := set(peers) - set(PEER_NAMES):
        print(f"No peer {', '.join(sorted(unknown))}; there are {', '.join(PEER_NAMES)}.")
        return 2
    run = board.Board(options.out or Path(), options.minutes, device, options.commit, peers)
    if options.out is None:
        folder = HERE.parent / "out" if rehearse and options.into == RESULTS else options.into
        run.out = folder / board.file_name(run.content)
    print(f"{report.headline(run.content)}\nto {run.out}", flush=True)
    chosen = board.choose(options.only)
    if rehearse:
        chosen = [case.shrunk() for case in chosen]
    run.run(chosen, lambda text: print(text, flush=True))
    show(run.out)
    # Nothing measured, or something wrong: the status says so.
    cells = run.content["cells"]
    wrong = any("normfast" not in cell["results"] for cell in cells) or not cells
    return 1 if wrong else 0


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or (arguments[0] not in _COMMANDS and arguments[0] not in ("-h", "--help")):
        arguments = ["run", *arguments]
    options = _parser().parse_args(arguments)
    if options.command == "list":
        for case in cases.cases():
            print(f"{case.label:<62} {case.nbytes / 2**20:9.1f} MB  {case.origin}")
        return 0
    if options.command == "report":
        show(options.file)
        return 0
    return _run(options)


if __name__ == "__main__":
    sys.exit(main())
