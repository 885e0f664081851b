"""The command line: ``python -m benchmarks [run|report|overhead|ceilings|list]``; without a word, ``run``."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import board, machine, native, peers, report, results, shapes
from .native import HERE

OUT = HERE / "out"
_COMMANDS = ("run", "report", "overhead", "ceilings", "list")


def _words(text: str) -> list[str]:
    return [word for word in text.replace(" ", "").split(",") if word]


def _numbers(text: str) -> list[int]:
    values = [int(word) for word in _words(text)]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError("one or more numbers of threads, separated by commas")
    return values


def _usual_threads() -> list[int]:
    """One, two, and as many as there are CPUs."""
    cpus = machine.machine()["cpus"]
    return sorted({1, min(2, cpus), cpus})


def _peers(text: str) -> list[str]:
    if text in ("all", "none"):
        return list(peers.NAMES) if text == "all" else []
    names = _words(text)
    unknown = [name for name in names if name not in peers.NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no peer {', '.join(unknown)}; there are {', '.join(peers.NAMES)}, all, none")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="check that all contenders agree, then time them")
    for command in (run, commands.add_parser("list", help="show the cases that a run would have")):
        command.add_argument("--set", default="headline", choices=shapes.SETS, dest="name")
        _filters(command)
    run.add_argument("--threads", type=_numbers, help="default 1, 2 and all; with --check-only 2")
    run.add_argument("--modes", type=_words, help="recycled,installed (default both; with --check-only installed)")
    run.add_argument("--peers", type=_peers, help=f"all (default), none, or some of {','.join(peers.NAMES)}")
    run.add_argument("--check-only", action="store_true", help="compare results, time nothing")
    run.add_argument("--rounds", type=int, default=11, help="samples of each contender (default 11)")
    run.add_argument("--budget", type=float, default=2.0, help="seconds per cell after which rounds end (default 2)")
    run.add_argument("--huge-pages", action="store_true", help="recycled: let malloc of glibc >= 2.35 use huge pages")
    run.add_argument(
        "--out",
        type=results.board_path,
        default=OUT / "board.json",
        help="JSON file; charts and Markdown lie beside it",
    )

    shown = commands.add_parser("report", help="tables, Markdown and charts of a JSON file")
    shown.add_argument("file", type=results.board_path)
    _filters(shown)
    shown.add_argument("--threads", type=_numbers)
    shown.add_argument("--modes", type=_words)
    shown.add_argument("--markdown", type=Path, help="write the tables here")
    shown.add_argument("--charts", type=Path, help="write the pictures into this folder (default: beside the file)")

    overhead = commands.add_parser("overhead", help="nanoseconds per call on tiny arrays")
    overhead.add_argument("--rounds", type=int, default=41)
    overhead.add_argument("--out", type=Path, default=OUT / "overhead.json")

    ceilings = commands.add_parser("ceilings", help="what one thread reaches in the steps that a norm is made of")
    ceilings.add_argument("--rounds", type=int, default=11)
    ceilings.add_argument("--out", type=Path, default=OUT / "ceilings.json")
    return parser


def _filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", type=_words, help="names or patterns: layer_norm,'*_backward'")
    parser.add_argument("--shapes", type=_words, help="for example 4096x768,8x768")
    parser.add_argument("--dtypes", type=_words, help=",".join(shapes.DTYPES))


def _progress(console: Console) -> Progress:
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.description}"), console=console, transient=True)


def _run(options: argparse.Namespace, console: Console, command: str) -> int:
    cases = shapes.select(options.name, options.ops, options.shapes, options.dtypes)
    if find_spec("ml_dtypes") is None and any(case.dtype == "bfloat16" for case in cases):
        cases = [case for case in cases if case.dtype != "bfloat16"]
        console.print("Without the package ml_dtypes NumPy has no bfloat16: those cases are left out.")
    if not cases:
        console.print("No case passes the filters; see `python -m benchmarks list`.")
        return 2
    check = options.check_only
    names = list(peers.NAMES) if options.peers is None else options.peers
    if check and options.peers is None:
        left_out = [name for name in names if peers.load(name).slow_start]
        names = [name for name in names if name not in left_out]
        console.print(
            f"Left out of a check unless named by --peers, because they compile for long: {', '.join(left_out)}"
        )
    plan = board.Plan(
        cases,
        options.threads or ([2] if check else _usual_threads()),
        options.modes or (["installed"] if check else list(board.MODES)),
        names,
        check,
        options.rounds,
        options.budget,
        options.huge_pages,
    )
    unknown = [mode for mode in plan.modes if mode not in board.MODES]
    if unknown:
        console.print(f"No mode {', '.join(unknown)}; there are {', '.join(board.MODES)}.")
        return 2
    result = board.new(plan, command)
    failure = None
    with _progress(console) as progress:
        task = progress.add_task("starting", total=plan.total)

        def arrived(cell: dict) -> None:
            progress.advance(task)
            if not check:
                results.save(result.content, options.out)

        listener = board.Listener(lambda text: progress.update(task, description=text), arrived)
        try:
            board.execute(plan, result, options.out.with_suffix(".log"), listener)
        except board.RunFailed as error:
            failure = str(error)
    return _conclude(result, plan, options, console, failure)


def _conclude(
    result: board.Run, plan: board.Plan, options: argparse.Namespace, console: Console, failure: str | None
) -> int:
    """Show what there is, then what went wrong; the exit status says whether anything did."""
    cells = result.content["cells"]
    if plan.check_only:
        compared = sum(len(cell["errors"]) for cell in cells)
        for name in (peers.SUBJECT, *plan.peers):
            mine = [cell["errors"][name] for cell in cells if name in cell["errors"]]
            lacks = sum(name in cell["lacks"] for cell in cells)
            text = f"agrees in {len(mine)} cells, largest error {max(mine):.1e}" if mine else "-"
            if name in result.content["lacking"]:
                console.print(f"{name:>14}  -  {result.content['lacking'][name]}", markup=False)
            else:
                console.print(f"{name:>14}  {text}" + (f", lacks {lacks}" if lacks else ""))
        console.print(f"{compared} results of {len(cells)} cells compared with normfast.reference.")
    elif cells:
        results.save(result.content, options.out)
        _show(results.Board(result.content), options.out, None, None, console)
    wrong = result.disagreements()
    for line in wrong:
        console.print(f"DISAGREES  {line}", style="bold red", markup=False)
    if failure:
        console.print(failure, style="bold red", markup=False)
    return 1 if wrong or failure else 0


def _show(shown: results.Board, file: Path, text: Path | None, charts: Path | None, console: Console) -> None:
    from . import chart

    report.terminal(shown, console)
    text = text or file.with_suffix(".md")
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(report.markdown(shown))
    pictures = chart.draw(shown, charts or file.with_suffix(""))
    console.print(
        f"Tables: {text}\nCharts: {', '.join(str(p) for p in pictures) or 'none'}", markup=False, highlight=False
    )


def _report(options: argparse.Namespace, console: Console) -> int:
    content = results.load(options.file)
    for name, show in _SMALL_TABLES.items():
        if name in content:
            console.print(show(content[name]))
            return 0
    keep = shapes.matcher(options.ops, options.shapes, options.dtypes)
    shown = results.Board(content)
    shown.cells = [
        cell
        for cell in shown.cells
        if keep(cell.case)
        and (not options.threads or cell.threads in options.threads)
        and (not options.modes or cell.mode in options.modes)
    ]
    if not shown.cells:
        console.print("No timed cell passes the filters.")
        return 2
    _show(shown, options.file, options.markdown, options.charts, console)
    return 0


_SMALL_TABLES = {"overhead": report.overhead_table, "ceilings": report.ceilings_table}


def _small_table(options: argparse.Namespace, console: Console, command: str) -> int:
    name = options.command
    module = import_module(f".{name}", __package__)
    with _progress(console) as progress:
        task = progress.add_task(name, total=options.rounds * module.PARTS)
        try:
            rows = module.table(options.rounds, lambda: progress.advance(task))
        except native.CannotBuild as error:
            console.print(str(error), markup=False)
            return 2
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts = {"date": date, "machine": machine.machine(), "command": command}
    results.save({"schema": board.SCHEMA, "normfast": machine.repository(), **facts, name: rows}, options.out)
    console.print(_SMALL_TABLES[name](rows))
    console.print(f"Written to {options.out}", markup=False, highlight=False)
    return 0


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or (arguments[0] not in _COMMANDS and arguments[0] not in ("-h", "--help")):
        arguments = ["run", *arguments]
    options = _parser().parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # a log has room, and cut-off tables are of no use
    if options.command in ("run", "overhead") and find_spec("normfast") is None:
        console.print("normfast is not installed in this environment: `pip install .` first.")
        return 2
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    if options.command == "list":
        for case in shapes.select(options.name, options.ops, options.shapes, options.dtypes):
            console.print(f"{case.label:<62} {case.nbytes / 2**20:8.2f} MB  {case.origin}", highlight=False)
        return 0
    if options.command == "report":
        return _report(options, console)
    if options.command in _SMALL_TABLES:
        return _small_table(options, console, command)
    return _run(options, console, command)


if __name__ == "__main__":
    sys.exit(main())
