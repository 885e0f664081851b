"""``python -m benchmarks.performance board.json ...``: boards into docs/performance.md and two charts beside it.

Every cell of the set ``networks`` becomes a line between the markers of the document: its time, its share of the
streaming limit, the best peer, and what it is bound by (`bounds`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

from . import chart
from .bounds import bound_by, cache_bytes
from .peers import SUBJECT
from .results import FRESH_BYTES, Board, Cell, duration, geometric_mean, load

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
MARKERS = ("<!-- board:begin -->", "<!-- board:end -->")
CHARTS = DOCUMENT.parent / "performance"


def _ratios(cells: Iterable[Cell], pick: Callable[[Cell], float | None]) -> list[float]:
    return [value for cell in cells if (value := pick(cell)) is not None]


def _best(cell: Cell) -> float | None:
    return cell.ratios[cell.best_peer] if cell.best_peer else None


def _torch(cell: Cell) -> float | None:
    return cell.ratios.get("torch")


def _first(cell: Cell) -> float | None:
    """The first call after a pause: that of the best peer over that of normfast."""
    first = {name: one["first"] for name, one in cell.raw["results"].items() if "first" in one}
    peers = [value for name, value in first.items() if name != SUBJECT]
    return min(peers) / first[SUBJECT] if peers and SUBJECT in first else None


def _shares(cells: Iterable[Cell], backward: bool, board: Board) -> list[float]:
    """Percent of the limit of the cells whose arrays lie beyond the last-level cache, 32-bit floats and bfloat16."""
    return [
        percent
        for cell in cells
        if cell.case.backward == backward
        and cell.case.streams * cell.case.nbytes > cache_bytes(board, "L3")
        and cell.case.dtype in ("float32", "bfloat16")
        and (percent := cell.percent()) is not None
    ]


def _goals(board: Board, mode: str, threads: int, cells: list[Cell]) -> list[tuple[str, str]]:
    """The figures that the project asks of itself, for one group of cells: what, and how much."""
    main = [cell for cell in cells if cell.case.dtype in ("float32", "bfloat16")]
    best, torch = _ratios(main, _best), _ratios(main, _torch)
    found: list[tuple[str, str]] = []
    if not torch:
        return found
    if mode == "installed":
        large = _ratios((cell for cell in main if cell.case.nbytes > FRESH_BYTES), _torch)
        if large:
            found.append(("PyTorch as installed, outputs above 32 MB, geometric mean", f"{geometric_mean(large):.2f}"))
        return found
    least = 1.0 if threads == 1 else 0.95
    slower = sum(value < least for value in best)
    found.append((f"cells below {least:g} of the best peer", f"{slower} of {len(best)}"))
    found.append(("best peer, geometric mean", f"{geometric_mean(best):.2f}"))
    found.append(("PyTorch, geometric mean", f"{geometric_mean(torch):.2f}"))
    first = _ratios(main, _first) if threads > 1 else []
    if first:
        text = f"{geometric_mean(first):.2f}, {sum(value < 1 for value in first)} below 1"
        found.append(("best peer, first call after a pause, geometric mean", text))
    for name, backward in (("forward", False), ("backward", True)):
        shares = _shares(cells, backward, board)
        if shares:
            text = f"median {median(shares):.0f} %, {min(shares):.0f} to {max(shares):.0f} % ({len(shares)} cells)"
            found.append((f"share of the limit beyond the cache, {name}", text))
    for dtype in ("float16", "float64"):
        values = _ratios((cell for cell in cells if cell.case.dtype == dtype), _torch)
        if values:
            found.append((f"PyTorch, {dtype}", f"{min(values):.2f} to {max(values):.2f}"))
    return found


def _line(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def _summary(boards: list[Board]) -> list[str]:
    columns: dict[tuple[str, int], dict[str, str]] = {}
    for board in boards:
        for mode, threads, cells in board.groups():
            columns.setdefault((mode, threads), {}).update(_goals(board, mode, threads, cells))
    threads = sorted({key[1] for key in columns})
    rows = list(dict.fromkeys(what for found in columns.values() for what in found))
    lines = [_line(["", *(f"{n} thread{'s' * (n > 1)}" for n in threads)]), _line(["---"] * (1 + len(threads)))]
    for what in rows:
        values = [next((f[what] for (_, n), f in columns.items() if n == t and what in f), "-") for t in threads]
        lines.append(_line([what, *values]))
    return lines


def _percent(cell: Cell) -> str:
    value = cell.percent()
    return "-" if value is None else f"{value:.0f} %"


def _against(cell: Cell) -> str:
    value = _best(cell)
    return "-" if value is None else f"{value:.2f} {cell.best_peer}" + "~" * cell.noisy(cell.best_peer or "")


def _key(cell: Cell) -> tuple:
    return cell.case.op, cell.case.shape, cell.case.layout, cell.case.dtype, cell.case.parameter_gradients


def _cells(boards: list[Board]) -> list[str]:
    """A table per operation: one thread in full, the other numbers of threads beside it."""
    recycled = [
        (board, threads, cell)
        for board in boards
        for mode, threads, cells in board.groups()
        if mode == "recycled"
        for cell in cells
    ]
    first = min((threads for _, threads, _ in recycled), default=1)
    others = sorted({threads for _, threads, _ in recycled} - {first})
    at = {(threads, _key(cell)): cell for _, threads, cell in recycled}
    lines: list[str] = []
    for op in dict.fromkeys(cell.case.op for _, _, cell in recycled):
        head = ["shape", "where", "time", "GB/s", "limit", "best peer", "PyTorch", "spread", "bound by"]
        head += [f"{n} threads: {what}" for n in others for what in ("limit", "best peer")]
        lines += ["", f"### {op}", "", _line(head), _line(["---", "---"] + ["---:"] * (len(head) - 2))]
        for board, threads, cell in recycled:
            if threads != first or cell.case.op != op:
                continue
            case, torch = cell.case, _torch(cell)
            shape = " ".join(
                part
                for part in (
                    "x".join(map(str, case.shape)),
                    case.layout.replace("channels-last", "NHWC"),
                    "" if case.dtype == "float32" else case.dtype,
                    "" if case.parameter_gradients else "dx only",
                )
                if part
            )
            values = [shape, case.origin, duration(cell.seconds), f"{cell.gbs:.1f}", _percent(cell), _against(cell)]
            values += ["-" if torch is None else f"{torch:.2f}", f"{100 * cell.spread:.0f} %", bound_by(cell, board)]
            for n in others:
                other = at.get((n, _key(cell)))
                values += [_percent(other), _against(other)] if other is not None else ["-", "-"]
            lines.append(_line(values))
    return lines


def block(boards: list[Board]) -> str:
    """Everything between the markers."""
    sources = [f"- {b.machine_line()}. {b.versions_line()}. `{b.content['command']}`" for b in boards]
    return "\n".join([*_summary(boards), "", *sources, *_cells(boards)])


def main(*paths: str) -> None:
    if not paths:
        sys.exit("which boards? python -m benchmarks.performance benchmarks/results/networks-*.json")
    boards = [Board(load(Path(path))) for path in paths]
    begin, end = MARKERS
    text = DOCUMENT.read_text()
    content = f"{begin}\n{block(boards)}\n{end}"
    fresh, count = re.subn(f"{begin}.*?{end}", lambda _: content, text, flags=re.DOTALL)
    if count != 1:
        sys.exit(f"{DOCUMENT} must hold {begin} ... {end} once")
    DOCUMENT.write_text(fresh)
    recycled = [board for board in boards if any(mode == "recycled" for mode, _, _ in board.groups())]
    for path in chart.by_size(recycled, CHARTS):
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
