# SPDX-License-Identifier: BSD-3-Clause

"""The board as a picture: the share of a copy's rate that normfast and its peers reach, cell by cell."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from .report import PEER_NAMES, headline, shares

# The colours of Okabe and Ito, as in the charts of the other board; markers differ as well.
_STYLE = {
    "normfast": ("#000000", "o"),
    "torch": ("#D55E00", "s"),
    "torch without cuDNN": ("#CC79A7", "P"),
    "torch.compile": ("#E69F00", "D"),
    "jax": ("#56B4E9", "v"),
}


def _label(cell: dict) -> str:
    case = cell["case"]
    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[case["dtype"]]
    what = {"stats": ", with statistics", "dx": ", dx alone"}.get(case["step"], "")
    return f"{'x'.join(map(str, case['shape']))}{' NHWC' * case['last']} {short}{what}"


def _panel(axis, cells: list[dict]) -> float:
    at, places, labels, op = 0.0, [], [], None
    order = list(dict.fromkeys(c["case"]["op"] for c in cells))
    for cell in sorted(cells, key=lambda c: order.index(c["case"]["op"])):
        if cell["case"]["op"] != op:
            at += 0.0 if op is None else 1.4
            op = cell["case"]["op"]
            heading = {"fontsize": 9, "fontweight": "bold", "ha": "right", "va": "center", "color": "#444444"}
            axis.text(-0.012, at - 0.9, op, transform=axis.get_yaxis_transform(), **heading)
        axis.axhline(at, color="#EEEEEE", linewidth=0.8, zorder=0)
        for name in (*PEER_NAMES, "normfast"):
            share = shares(cell, name)[0]
            if share is not None:
                colour, marker = _STYLE[name]
                size = 7 if name == "normfast" else 5.5
                axis.plot(share, at, marker, color=colour, markersize=size, markeredgecolor="white", linestyle="")
        places.append(at)
        labels.append(_label(cell))
        at += 1.0
    axis.set_yticks(places, labels, fontsize=8.5)
    axis.axvline(100, color="black", linewidth=1.2)
    axis.set_xlabel("% of the rate of a copy")
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    return at


def draw(content: dict, path: Path) -> None:
    cells = [c for c in content["cells"] if c["results"] and c["case"]["part"] == "headline"]
    back = ("dx", "backward")
    panels = [
        ("forward", [c for c in cells if c["case"]["step"] not in back]),
        ("backward", [c for c in cells if c["case"]["step"] in back]),
    ]
    panels = [(name, chosen) for name, chosen in panels if chosen]
    if not panels:
        return
    tallest = max(len(chosen) + 1.4 * 5 for _, chosen in panels)
    size = (8.2 * len(panels), 2.0 + 0.21 * tallest)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    right = max((s for c in cells for n in c["results"] if (s := shares(c, n)[0]) is not None), default=100.0)
    ends = []
    for axis, (name, chosen) in zip(axes[0], panels, strict=True):
        ends.append(_panel(axis, chosen))
        axis.set_title(name, loc="left", fontsize=11, fontweight="bold")
        axis.set_xlim(0, max(105, right * 1.05))
    for axis in axes[0]:
        axis.set_ylim(max(ends), -1.5)
    shown = [n for n in _STYLE if any(n in c["results"] for c in cells)]
    handles = [Line2D([], [], color=_STYLE[n][0], marker=_STYLE[n][1], linestyle="", label=n) for n in shown]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
    legend.set_title(headline(content), prop={"size": 8})
    what = "A rehearsal: the figures mean nothing" if content["rehearsal"] else "Least traffic over time"
    figure.suptitle(f"{what}, as a share of a copy of the same arrays", fontsize=14)
    figure.savefig(path, dpi=120)
    plt.close(figure)
