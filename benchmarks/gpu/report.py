# SPDX-License-Identifier: BSD-3-Clause

"""The board as one Markdown table with a summary; made from the JSON alone, on any machine."""

from __future__ import annotations

from ..results import geometric_mean

NOTES = (
    "us: median time of one call on the device. GB/s: least possible traffic (every input read once, every output "
    "written once) over that time. of copy: that, as a share of the fastest copy of the same arrays in the same run; "
    "of sum: as a share of a pass that reads two arrays and writes one. A number under a peer is its time over that "
    "of normfast: above 1, normfast is faster. Inputs and outputs rotate among sets larger than twice the L2 cache. "
    "Results agree with the float64 reference before they are timed."
)
PEER_NAMES = ("torch", "torch without cuDNN", "torch.compile", "jax")


def copy_of(cell: dict) -> float:
    return max(cell["ceilings"][name] for name in ("copy", "neg") if name in cell["ceilings"])


def shares(cell: dict, name: str = "normfast") -> tuple[float | None, float | None]:
    """Percent of the copy, and of the sum where there is one."""
    if name not in cell["results"]:
        return None, None
    gbs, triad = cell["results"][name]["gbs"], cell["ceilings"].get("add")
    return 100 * gbs / copy_of(cell), 100 * gbs / triad if triad else None


def ratio(cell: dict, peer: str) -> float | None:
    results = cell["results"]
    return results[peer]["us"] / results["normfast"]["us"] if peer in results and "normfast" in results else None


def headline(content: dict) -> str:
    gpu, state = content["gpu"], content["normfast"]
    smi = gpu.get("nvidia_smi") or {}
    driver = smi.get("driver_version") or gpu.get("driver")
    clocks = f", SM clock up to {smi['clocks.max.sm']}" if smi.get("clocks.max.sm") else ""
    commit = (state["commit"] or "unknown")[:10] + ("+" if state["modified"] else "")
    names = {"torch": "PyTorch", "jax": "JAX"}
    versions = ", ".join(f"{names.get(n, n)} {content['versions'][n]}" for n in names if n in content["versions"])
    return (
        f"{gpu['name']}, {gpu.get('multiprocessors')} multiprocessors, driver {driver}, CUDA runtime "
        f"{state['cuda'].get('toolkit')}{clocks}; normfast {state['version']} at {commit}; {versions}, cuDNN "
        f"{gpu.get('cudnn')}; {content['date'][:10]}"
    )


def _line(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def summary(content: dict) -> list[list[str]]:
    """Geometric means over groups of cells: share of the copy, and the time of every peer over normfast's."""
    headlines = [c for c in content["cells"] if c["case"]["part"] == "headline" and "normfast" in c["results"]]
    large = [c for c in headlines if c["least_bytes"] >= 100e6]
    groups: list[tuple[str, list[dict]]] = [("all", headlines), ("100 MB and more", large)]
    for back in (False, True):
        word = "backward" if back else "forward"
        some = [c for c in headlines if (c["case"]["step"] in ("dx", "backward")) == back]
        groups.append((word, some))
        for op in dict.fromkeys(c["case"]["op"] for c in some):
            groups.append((f"{op} {word}", [c for c in some if c["case"]["op"] == op]))
    rows = []
    for name, cells in groups:
        if not cells:
            continue
        means = [geometric_mean(shares(c)[0] for c in cells)]
        best = [min(values) for c in cells if (values := [r for p in PEER_NAMES if (r := ratio(c, p)) is not None])]
        peers = [[r for c in cells if (r := ratio(c, p)) is not None] for p in PEER_NAMES]
        means += [geometric_mean(values) for values in (best, *peers)]
        forms = [".0f"] + [".2f"] * (len(means) - 1)
        values = [_number(m, f) for m, f in zip(means, forms, strict=True)]
        rows.append([name, str(len(cells)), values[0] + " %", *values[1:]])
    return rows


def markdown(content: dict) -> str:
    lines = [headline(content) + ".", ""]
    if content["rehearsal"]:
        lines += ["**A rehearsal on the host: the figures mean nothing.**", ""]
    lines += [_line(["geometric mean", "cells", "of copy", "best peer", *PEER_NAMES])]
    lines += [_line(["---"] + ["---:"] * (3 + len(PEER_NAMES)))]
    lines += [_line(row) for row in summary(content)] + [""]
    columns = ["pass", "us", "GB/s", "of copy", "of sum", "spread", *PEER_NAMES, "where"]
    lines += [_line(columns), _line(["---"] + ["---:"] * (len(columns) - 2) + ["---"])]
    for cell in content["cells"]:
        own = cell["results"].get("normfast")
        if own is None:
            lines.append(_line([cell["label"], cell["lacks"].get("normfast", "-"), *["-"] * (len(columns) - 2)]))
            continue
        copy, triad = shares(cell)
        values = [cell["label"], f"{own['us']:.1f}", f"{own['gbs']:.0f}", f"{copy:.0f} %"]
        values += [f"{triad:.0f} %" if triad else "-", f"{100 * own['spread']:.0f} %"]
        ratios = [ratio(cell, p) for p in PEER_NAMES]
        best = min((r for r in ratios if r is not None), default=None)
        values += [f"**{r:.2f}**" if r is not None and r == best else _number(r, ".2f") for r in ratios]
        lines.append(_line([*values, cell["case"]["origin"]]))
    for name, title in (("ceilings", "What the device gives"), ("clusters", "Room for clusters")):
        if content.get(name):
            lines += ["", _line([title, "", ""]), _line(["---", "---:", "---"])]
            lines += [_line([row["call"], f"{row['value']:.0f}", row["unit"]]) for row in content[name]]
    for title, rows in (
        ("Host time per call on (8, 768) float32, without waiting for the device", content["overhead"]),
        ("Time per call in a replayed CUDA graph of 20 calls", content["graphs"]),
    ):
        if rows:
            lines += ["", _line([title, "us"]), _line(["---", "---:"])]
            lines += [_line([f"`{row['call']}`", f"{row['us']:.2f}"]) for row in rows]
    if content["troubles"]:
        lines += ["", "Troubles:", "", *(f"- {text}" for text in content["troubles"])]
    if content["not_reached"]:
        lines += ["", f"Not reached in the time: {', '.join(content['not_reached'])}."]
    return "\n".join([*lines, "", NOTES, ""])
