"""Error of y against offset, and against size, for all libraries: two pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

STYLE = {  # colours of Okabe and Ito; markers differ as well
    "normfast": ("#000000", "o"),
    "PyTorch": ("#D55E00", "s"),
    "NumPy": ("#999999", "v"),
    "JAX": ("#56B4E9", "^"),
    "ONNX Runtime": ("#CC79A7", "P"),
    "scikit-learn": ("#009E73", "X"),
}
NAMES = {
    "layer_norm": "layer norm",
    "rms_norm": "RMS norm",
    "group_norm": "group norm",
    "instance_norm": "instance norm",
    "batch_norm": "batch norm",
    "batch_norm_eval": "batch norm, evaluation",
}
LEAST = 0.1  # ulps: the lower edge; an error of zero lies on it


def draw(content: dict, folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    offsets = [
        (NAMES[op], [(row["offset"], row) for row in content["offset"] if row["op"] == op])
        for op in dict.fromkeys(row["op"] for row in content["offset"])
    ]
    sizes = []
    for op in dict.fromkeys(row["op"] for row in content["size"]):
        for mean in dict.fromkeys(row["offset"] for row in content["size"]):
            rows = [(r["n"], r) for r in content["size"] if (r["op"], r["offset"]) == (op, mean)]
            sizes.append((f"{NAMES[op]}, data N({mean:g}, 1)", rows))
    return [
        _picture(offsets, "offset: mean of the data, in standard deviations", 0.3, folder / "offset.png"),
        _picture(sizes, "cells that share a statistic", None, folder / "size.png"),
    ]


def _picture(panels: list, label: str, origin: float | None, path: Path) -> Path:
    """Small multiples on the same axes, both logarithmic; `origin` is where an offset of zero is drawn."""
    import matplotlib.pyplot as plt

    columns = 3 if len(panels) > 4 else 2
    rows = math.ceil(len(panels) / columns)
    size = (4.0 * columns, 3.0 * rows + 0.8)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, layout="constrained")
    handles = {}
    for axis, (title, points) in zip(grid.flat, panels, strict=False):
        for name, (colour, marker) in STYLE.items():
            found = [(x, row["libraries"][name]["y ulps"]) for x, row in points if name in row["libraries"]]
            if found:
                xs, ys = zip(*(_place(x, y, origin) for x, y in found), strict=True)
                width = 2.2 if name == "normfast" else 1.2
                handles[name] = axis.plot(xs, ys, color=colour, marker=marker, markersize=4, linewidth=width)[0]
        axis.axhline(3, color="#666666", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", yscale="log", ylim=(LEAST, 1e8))
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axis.grid(color="#E5E5E5", linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        if origin is not None:
            powers = [1, 1e2, 1e4, 1e6]
            axis.set_xticks([origin, *powers], ["0", "1", *(f"$10^{int(math.log10(p))}$" for p in powers[1:])])
            axis.minorticks_off()
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in grid.flat[max(0, len(panels) - columns) : len(panels)]:
        axis.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel(label, fontsize=10)
    figure.supylabel("largest error of y, ulp", fontsize=10)
    order: Iterable[str] = [name for name in STYLE if name in handles]
    figure.legend([handles[n] for n in order], order, loc="outside upper center", ncols=6, frameon=False, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _place(x: float, y: float, origin: float | None) -> tuple[float, float]:
    """Zero goes to the edge; a NaN, which counts as infinite, is left out of the line."""
    return (origin if origin is not None and x == 0 else x), (max(y, LEAST) if math.isfinite(y) else math.nan)
