"""The board as tables: on the terminal (rich) and as Markdown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .results import Board, Cell, duration, summarise

NOTES = (
    "time: median of one normfast call. GB/s: least possible traffic (every input read once, every output written "
    "once) over time. limit: that, as a share of the fastest plain copy (forward) or two-read-one-write triad "
    "(backward) of the same arrays with as many threads in the same rounds. spread: quartile range over median. A "
    "number under a peer is its time over normfast's: above 1, normfast is faster. - : the peer lacks the operation or "
    "is not installed. "
    "~ : too few quiet samples, or other processes were busy. ! : fresh pages in spite of recycled outputs."
)
_TITLES = {"recycled": "recycled outputs", "installed": "as installed"}


def title(mode: str, threads: int) -> str:
    return f"{_TITLES[mode]}, {threads} thread{'s' * (threads > 1)}"


def ratio(cell: Cell, name: str) -> str:
    if name not in cell.ratios:
        return "-"
    value = cell.ratios[name]
    text = f"{value:.2f}" if value < 10 else f"{value:.3g}"
    return text + "~" * cell.noisy(name) + "!" * cell.faulting(name)


def _columns(board: Board) -> list[str]:
    return ["op", "shape", "dtype", "time", "GB/s", "limit", "spread", *board.peers]


def _shape(cell: Cell) -> str:
    text = "x".join(map(str, cell.case.shape))
    return f"{text} {cell.case.layout}".strip()


def _row(board: Board, cell: Cell) -> list[str]:
    percent = cell.percent()
    return [
        cell.case.op,
        _shape(cell),
        cell.case.dtype,
        duration(cell.seconds),
        f"{cell.gbs:.3g}",
        f"{percent:.0f} %" if percent else "-",
        f"{100 * cell.spread:.0f} %",
        *(ratio(cell, name) for name in board.peers),
    ]


def terminal(board: Board, console: Console) -> None:
    console.print(board.machine_line(), style="dim")
    console.print(f"Peers: {board.versions_line()}", style="dim")
    if "limits_missing" in board.content:
        console.print(f"No streaming limits: {board.content['limits_missing']}", style="yellow")
    for mode, threads, cells in board.groups():
        table = Table(title=f"{title(mode, threads)}: time of a peer over time of normfast", title_justify="left")
        for number, name in enumerate(_columns(board)):
            table.add_column(name, justify="left" if number < 3 else "right", no_wrap=True)
        last = None
        for cell in cells:
            if last is not None and cell.case.op != last:
                table.add_section()
            last = cell.case.op
            best = cell.best_peer
            values = _row(board, cell)
            for position, name in enumerate(board.peers, start=len(values) - len(board.peers)):
                if name in cell.ratios:
                    colour = "red" if cell.ratios[name] < 1 else ("bold" if name == best else "")
                    values[position] = f"[{colour}]{values[position]}[/]" if colour else values[position]
            table.add_row(*values)
        console.print(table)
        console.print(_summary_table(board, mode, threads, cells))
    disturbed = sum(cell.disturbed for cell in board.cells)
    if disturbed:
        text = (
            f"In {disturbed} of {len(board.cells)} cells other processes were busy: measure again on a quiet machine."
        )
        console.print(text, style="bold yellow")
    for line in board.inaccurate():
        console.print(f"Far from exact: {line}", style="yellow", markup=False)
    console.print(NOTES, style="dim")


def _summary_table(board: Board, mode: str, threads: int, cells: list[Cell]) -> Table:
    table = Table(title=f"summary, {title(mode, threads)}", title_justify="left")
    for name in ("against", "cells", "geometric mean", "least", "at", "cells below 1"):
        table.add_column(name, justify="left" if name in ("against", "at") else "right")
    for s in summarise(cells, board.peers):
        table.add_row(s.name, str(s.cells), f"{s.mean:.2f}", f"{s.least:.2f}", s.least_at, str(s.slower))
    return table


def markdown(board: Board) -> str:
    """The same tables for a document."""
    lines = [board.machine_line() + ".", "", f"Peers: {board.versions_line()}.", ""]
    for mode, threads, cells in board.groups():
        columns = _columns(board)
        lines += [f"### {title(mode, threads).capitalize()}", ""]
        lines += [_line(columns), _line(["---"] * 3 + ["---:"] * (len(columns) - 3))]
        for cell in cells:
            values = _row(board, cell)
            best = cell.best_peer
            if best:
                position = len(values) - len(board.peers) + board.peers.index(best)
                values[position] = f"**{values[position]}**"
            lines.append(_line(values))
        lines += ["", _line(["against", "cells", "geometric mean", "least", "at", "cells below 1"])]
        lines.append(_line(["---", "---:", "---:", "---:", "---", "---:"]))
        for s in summarise(cells, board.peers):
            lines.append(_line([s.name, str(s.cells), f"{s.mean:.2f}", f"{s.least:.2f}", s.least_at, str(s.slower)]))
        lines.append("")
    lines += [f"Far from exact: {line}." for line in board.inaccurate()]
    lines += [NOTES.replace("~ :", "`~`:").replace("! :", "`!`:").replace("- :", "`-`:"), ""]
    return "\n".join(lines)


def _line(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


def ceilings_table(rows: list[dict]) -> Table:
    """What one thread reaches; see `ceilings`."""
    table = Table(title="one thread, GB/s of least traffic", title_justify="left")
    for name in ("what", "GB/s", "spread"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        table.add_row(row["what"], f"{row['gbs']:.1f}", f"{row['spread']:.0%}")
    return table


def overhead_table(rows: list[dict]) -> Table:
    """The table of per-call overhead; see `overhead`."""
    table = Table(title="nanoseconds per call, over an empty call", title_justify="left")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    table.add_column("call")
    for shape in shapes:
        table.add_column(shape, justify="right")
        table.add_column("/ np.add", justify="right")
    times = {(row["call"], row["shape"]): row["ns"] for row in rows}
    for call in dict.fromkeys(row["call"] for row in rows):
        values = []
        for shape in shapes:
            values += [f"{times[call, shape]:.0f}", f"{times[call, shape] / times['np.add(x, x)', shape]:.2f}"]
        table.add_row(call, *values)
    return table
