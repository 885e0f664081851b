"""The board as pictures: ratio to every peer; ratio to the best, and share of the streaming limit, by working set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .report import title
from .results import Board, Cell, bytes_of

# Colours of Okabe and Ito, which people with any common colour blindness tell apart; markers differ as well.
_PEER_STYLE = {
    "numpy": ("#999999", "o"),
    "torch": ("#D55E00", "s"),
    "torch.compile": ("#E69F00", "D"),
    "numba": ("#009E73", "^"),
    "jax": ("#56B4E9", "v"),
    "onnxruntime": ("#CC79A7", "P"),
    "onednn": ("#0072B2", "X"),
}
_FAMILY_STYLE = {
    "layer_norm": ("#0072B2", "layer norm"),
    "rms_norm": ("#56B4E9", "RMS norm"),
    "batch_norm": ("#D55E00", "batch norm"),
    "group_norm": ("#009E73", "group norm"),
    "instance_norm": ("#E69F00", "instance norm"),
}
_GREY = "#444444"
_MOST_PERCENT = 150
_HEADING = {"fontsize": 9, "fontweight": "bold", "ha": "right", "va": "center", "color": _GREY}


def draw(board: Board, folder: Path) -> list[Path]:
    """Write all pictures of a board and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for mode, threads, cells in board.groups():
        stem = f"{mode}-{threads}-thread{'s' * (threads > 1)}"
        paths.append(_ratios(board, cells, f"{title(mode, threads)}", folder / f"ratios-{stem}.png"))
    return paths + by_size([board], folder)


def _label(cell: Cell) -> str:
    case = cell.case
    short = {"float32": "", "float64": " f64", "float16": " f16", "bfloat16": " bf16"}[case.dtype]
    layout = " NHWC" if case.channels_last else (f" {case.layout}" if case.layout else "")
    return "x".join(map(str, case.shape)) + layout + short


def _ratios(board: Board, cells: list[Cell], subtitle: str, path: Path) -> Path:
    panels = [
        ("forward", [c for c in cells if not c.case.backward]),
        ("backward", [c for c in cells if c.case.backward]),
    ]
    panels = [(name, chosen) for name, chosen in panels if chosen]
    tallest = max(len(chosen) - 1.0 + 1.4 * len({c.case.op for c in chosen}) for _, chosen in panels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(8.2 * len(panels), 2.0 + 0.21 * tallest), squeeze=False, layout="constrained"
    )
    values = [ratio for cell in cells for ratio in cell.ratios.values()] or [1.0]
    for axis, (name, chosen) in zip(axes[0], panels, strict=True):
        _ratio_panel(axis, chosen, board.peers)
        axis.set_title(name, loc="left", fontsize=11, fontweight="bold")
        axis.set_xlim(min(0.5, min(values) / 1.3), max(4.0, max(values) * 1.3))
        axis.set_ylim(tallest, -1.5)
    handles = [
        Line2D([], [], color=_PEER_STYLE[n][0], marker=_PEER_STYLE[n][1], linestyle="", markersize=7, label=n)
        for n in board.peers
        if any(n in cell.ratios for cell in cells)
    ]
    figure.suptitle(f"How many times longer each peer takes than normfast ({subtitle})", fontsize=14)
    return _finish([board], figure, handles, path)


def _dot(axis: Axes, x: float, y: float, colour: str, marker: str, size: float) -> None:
    style = {"markeredgecolor": "white", "markeredgewidth": 0.6, "linestyle": ""}
    axis.plot(x, y, marker=marker, color=colour, markersize=size, **style)


def _finish(boards: list[Board], figure: Figure, handles: list[Line2D], path: Path) -> Path:
    """The legend, with machine and commit of each board under it, and the file."""
    columns = len(handles) if figure.get_figwidth() > 12 else (len(handles) + 1) // 2
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    legend.set_title("\n".join(dict.fromkeys(board.machine_line() for board in boards)), prop={"size": 8})
    legend.get_title().set_color(_GREY)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _ratio_panel(axis: Axes, cells: list[Cell], peers: list[str]) -> None:
    places, labels, at, op = [], [], 0.0, None
    for cell in sorted(cells, key=lambda c: list(dict.fromkeys(x.case.op for x in cells)).index(c.case.op)):
        if cell.case.op != op:
            at += 0.0 if op is None else 1.4
            op = cell.case.op
            axis.text(-0.012, at - 0.9, op, transform=axis.get_yaxis_transform(), **_HEADING)
        axis.axhline(at, color="#EEEEEE", linewidth=0.8, zorder=0)
        for name in peers:
            if name in cell.ratios:
                colour, marker = _PEER_STYLE[name]
                _dot(axis, cell.ratios[name], at, colour, marker, 6)
        places.append(at)
        labels.append(_label(cell))
        at += 1.0
    axis.set_xscale("log")
    axis.axvline(1.0, color="black", linewidth=1.2)
    axis.set_yticks(places, labels, fontsize=8.5)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("time of peer / time of normfast")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)


def by_size(boards: list[Board], folder: Path) -> list[Path]:
    """Two pictures over the size of the working set, a panel for each number of threads, outputs recycled: ratio to the
    best peer, and share of the streaming limit."""
    folder.mkdir(parents=True, exist_ok=True)
    panels = [(b, threads, cells) for b in boards for mode, threads, cells in b.groups() if mode == "recycled"]
    if not panels:
        return []
    ratios = _Picture(
        folder / "best-peer.png",
        "How many times longer the best of all peers takes than normfast",
        "time of the best peer / time of normfast",
        lambda cell: cell.ratios[cell.best_peer] if cell.best_peer else None,
        lambda cell: None,
    )
    shares = _Picture(
        folder / "limits.png",
        "Least traffic over time, as a share of a plain copy or triad of the same arrays",
        "% of the streaming limit",
        lambda cell: cell.percent(),
        lambda cell: cell.percent(cell.best_peer) if cell.limit and cell.best_peer else None,
        _MOST_PERCENT,
    )
    return [_draw_by_size(picture, panels) for picture in (ratios, shares)]


@dataclass(frozen=True)
class _Picture:
    path: Path
    title: str
    label: str
    value: Callable[[Cell], float | None]
    peer: Callable[[Cell], float | None]  # drawn in grey beside it
    most: float | None = None  # what is more is drawn there, pointing upward


def _draw_by_size(picture: _Picture, panels: list[tuple[Board, int, list[Cell]]]) -> Path:
    figure, axes = plt.subplots(
        1, len(panels), figsize=(max(9.5, 7.5 * len(panels)), 6.0), sharey=True, squeeze=False, layout="constrained"
    )
    families, peers, label = set(), False, picture.label
    for axis, (board, threads, cells) in zip(axes[0], panels, strict=True):
        for cell in cells:
            value, peer = picture.value(cell), picture.peer(cell)
            if value is None:
                continue
            families.add(cell.case.family)
            size = cell.case.streams * cell.case.nbytes
            if peer is not None:
                peers = True
                peer = peer if picture.most is None else min(peer, picture.most)
                axis.plot(size, peer, marker="_", color="#999999", markersize=8, zorder=1)
            colour, marker = _FAMILY_STYLE[cell.case.family][0], "v" if cell.case.backward else "o"
            if picture.most is not None and value > picture.most:  # a disturbed limit would squeeze all others
                value, marker, label = picture.most, "^", f"{picture.label} (upward: above {picture.most})"
            _dot(axis, size, value, colour, marker, 7)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(value)))
        if peers:
            axis.axhline(100, color="black", linewidth=1)
        else:
            axis.axhline(1, color="black", linewidth=1)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        _mark_caches(axis, board)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_title(f"{threads} thread{'s' * (threads > 1)}", loc="left", fontsize=11, fontweight="bold")
        axis.set_xlabel("working set: arrays as large as x, read and written")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0][0].set_ylabel(label)
    if peers:
        axes[0][0].set_ylim(bottom=0)  # not sooner: it would end the search for the other end, which all panels share
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", markersize=7, label=label)
        for family, (colour, label) in _FAMILY_STYLE.items()
        if family in families
    ]
    handles += [
        Line2D([], [], color=_GREY, marker="o", linestyle="", label="forward"),
        Line2D([], [], color=_GREY, marker="v", linestyle="", label="backward"),
    ]
    if peers:
        handles.append(Line2D([], [], color="#999999", marker="_", linestyle="", markersize=9, label="best peer"))
    figure.suptitle(picture.title, fontsize=14)
    return _finish([board for board, _, _ in panels], figure, handles, picture.path)


def _mark_caches(axis: Axes, board: Board) -> None:
    low, high = axis.get_xlim()
    for level, text in board.content["machine"]["caches"].items():
        if low < bytes_of(text) < high:
            axis.axvline(bytes_of(text), color="#BBBBBB", linestyle=":", linewidth=1)
            place = axis.get_xaxis_transform()  # across in bytes, up from 0 at the foot of the panel to 1 at its head
            axis.text(bytes_of(text), 0, f" {level}", fontsize=9, color=_GREY, va="bottom", transform=place)


def _size(value: float) -> str:
    for unit, scale in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g} B"
