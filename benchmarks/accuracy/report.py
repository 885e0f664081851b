"""The stored figures as text: tables and charts of docs/numerics.md, the excerpt of README.md."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

from . import charts
from .charts import NAMES
from .inputs import power

BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
TABLE_OFFSETS = (0.0, 1e4, 1e6)
README_OPS = ("layer_norm", "batch_norm")
GRADIENTS = ("dx", "dweight", "dbias")


def ulps(value: float | None) -> str:
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "NaN"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def relative(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if math.isfinite(value) else "NaN"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def table(headings: list[str], rows: list[list[str]], left: int) -> str:
    """Markdown; the first `left` columns are text, the others figures."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * left + "---:|" * (len(headings) - left)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def text(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False, break_long_words=False)


# ---- normfast alone


def worst(content: dict) -> str:
    rows = [
        [
            NAMES[row["op"]],
            row["dtype"],
            *(ulps(_largest(row, f"{quantity} ulps")) for quantity in ("y", *GRADIENTS)),
            *(relative(_largest(row, f"{quantity} norm")) for quantity in GRADIENTS),
            f"{row['samples']:,}",
        ]
        for row in content["worst"]
    ]
    headings = ["norm", "dtype", "y, ulp", *(f"{g}, ulp" for g in GRADIENTS), *(f"{g}, norm" for g in GRADIENTS), "N"]
    return table(headings, rows, 2)


def _largest(row: dict, key: str) -> float | None:
    return row["largest"][key][0] if key in row["largest"] else None


def inputs(content: dict) -> str:
    rows = []
    for row in content["worst"]:
        for quantity in ("y", *GRADIENTS):
            value, label = row["largest"].get(f"{quantity} ulps", (None, None))
            if value:
                rows.append([quantity, ulps(value), f"`{label}`"])
    return table(["of", "ulp", "input"], rows, 1).replace("|---|---:|---:|", "|---|---:|---|")


def together(content: dict) -> str:
    """What forward and backward of float32 data miss the gradient of the data by."""
    rows = []
    for row in content["worst"]:
        if row["dtype"] == "float32":
            cells = [NAMES[row["op"]]]
            for quantity in ("dx", "dweight"):
                value, label = row["largest"][f"{quantity} of both norm"]
                cells += [relative(value), f"`{label}`"]
            rows.append(cells)
    lines = table(["norm", "dx", "input", "dweight", "input"], rows, 1)
    return lines.replace("|---|---:|---:|---:|---:|", "|---|---:|---|---:|---|")


# ---- beside other libraries


def beside(content: dict, ops: tuple[str, ...] | None = None) -> str:
    """Largest error of y at a few offsets."""
    chosen = [r for r in content["offset"] if r["offset"] in TABLE_OFFSETS and (ops is None or r["op"] in ops)]
    libraries = list(content["libraries"])
    rows = [
        [NAMES[r["op"]], power(r["offset"]), *(ulps(r["libraries"].get(name, {}).get("y ulps")) for name in libraries)]
        for r in chosen
    ]
    return table(["norm", "offset", *libraries], rows, 1)


def gradients(content: dict) -> str:
    chosen = [r for r in content["offset"] if r["offset"] in TABLE_OFFSETS]
    libraries = [n for n in content["libraries"] if any("dx norm" in r["libraries"].get(n, {}) for r in chosen)]
    pairs = [(quantity, name) for quantity in ("dx", "dweight") for name in libraries]
    rows = [
        [NAMES[r["op"]], power(r["offset"]), *(relative(r["libraries"][n].get(f"{q} norm")) for q, n in pairs)]
        for r in chosen
    ]
    return table(["norm", "offset", *(f"{quantity}, {name}" for quantity, name in pairs)], rows, 1)


def narrow(content: dict) -> str:
    libraries = list(content["narrow"][0]["libraries"])
    pairs = [(quantity, name) for quantity in ("dweight", "dbias") for name in libraries]
    rows = [
        [NAMES[r["op"]], r["dtype"], *(percent(r["libraries"][name].get(quantity)) for quantity, name in pairs)]
        for r in content["narrow"]
    ]
    return table(["norm", "dtype", *(f"{quantity}, {name}" for quantity, name in pairs)], rows, 2)


def source(content: dict) -> str:
    machine, config = content["machine"], content["normfast"]["config"]
    versions = ", ".join(f"{name} {number}" for name, number in content["libraries"].items())
    commit = (content["normfast"]["commit"] or "unknown")[:10]
    return text(
        f"{machine['cpu']}, code path {config['code_path']}, normfast at {commit}, {content['date'][:10]}. {versions}.",
        f"Written by `{content['command']}` in {content['seconds'] // 60 + 1} minutes; the figures of every kind and",
        "size are in `benchmarks/results/accuracy.json`.",
    )


def _standard(content: dict) -> str:
    shapes = {r["op"]: "x".join(map(str, r["shape"])) for r in content["offset"]}
    count = content["offset"][0]["samples"]
    return (
        f"float32, data N(offset, 1), {shapes['layer_norm']} for layer and RMS norm, {shapes['batch_norm']} for the "
        f"others (8 groups); the largest seen in {count} samples."
    )


def page(content: dict) -> str:
    sizes = sorted({row["n"] for row in content["kinds"]})
    blocks = [
        "### normfast",
        text(
            f"The largest seen in N samples: rows, columns and images, {sizes[0]} to {sizes[-1]:,} cells to a",
            "statistic (float64: to 10^6), of every kind named under `kinds` in the JSON file: offsets 0 to 1e6,",
            "scales",
            "1e-30 to 1e30, constants, a spike, a ramp, two values, subnormal numbers, `eps=0`, `dy` of one sign. An",
            "ulp of y and of dx is that of the largest value of the row (group, channel), of dx before its terms",
            "cancel; an ulp of a parameter gradient is that of the root of the sum of the squares of its terms, or of",
            "their sum where that is larger. The norm of an error is taken relative to the exact gradient or its",
            "terms,",
            "whichever is larger. In 16 bits what lies beyond half an ulp of the result's own counts, in float32",
            "ulps: 0 is correctly",
            "rounded. Gradients are compared with the exact ones at the statistics that forward returned.",
        ),
        worst(content),
        "<details><summary>The inputs that gave them</summary>",
        "`python -m benchmarks.accuracy input LABEL` measures one again.",
        inputs(content),
        "</details>",
        text(
            "Forward and backward of float32 data together, against the gradient of the data themselves, the error in",
            "norm as above:",
        ),
        together(content),
        "### Beside other libraries",
        text("y, largest error in ulp.", _standard(content), _NOTE),
        beside(content),
        text("Gradients, error in norm; the same samples. ONNX Runtime and scikit-learn have none."),
        gradients(content),
        "![Error of y against the offset of the data](numerics/offset.png)",
        "![Error of y against the number of cells](numerics/size.png)",
        text(
            "The dashed line is the promise, 3 ulp. Where a line ends the result is NaN. Sizes: one sample of each, of",
            "100,000 cells or one row or channel.",
        ),
        "### Parameter gradients of 16-bit data",
        text(
            "Each parameter's gradient is a sum of 65536 terms, `dy` about one half, x N(0.7, 1): the relative error",
            "in norm, one sample, the rounding to 16 bits included (at most 0.4 % in bfloat16, 0.05 % in float16, and",
            "usually half of that). NumPy computes the plain formulas in 16 bits.",
        ),
        narrow(content),
        source(content),
    ]
    return "\n\n".join(blocks)


_NOTE = (
    "NumPy and JAX (under `jit`) compute the textbook formulas, the variance with `var`; PyTorch has a function for "
    "each norm, ONNX Runtime an operator (forward only; no batch statistics on the CPU). scikit-learn's "
    "`StandardScaler` is "
    "batch norm of a table with `eps=0`, without weight and bias, and is compared with just that."
)


def readme(content: dict) -> str:
    return "\n\n".join(
        ["y, largest error in ulp:", beside(content, README_OPS), text(_standard(content)), source(content)]
    )


def replace(path: Path, block: str) -> None:
    """Put it between the two markers of the page."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}", encoding="utf-8")


def write(content: dict, root: Path) -> list[Path]:
    """Everything that is made from the figures; the paths written."""
    replace(root / "docs" / "numerics.md", page(content))
    replace(root / "README.md", readme(content))
    pictures = charts.draw(content, root / "docs" / "numerics")
    return [root / "docs" / "numerics.md", root / "README.md", *pictures]
