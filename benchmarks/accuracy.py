"""Errors of float32 results, near zero and far from it: normfast against PyTorch, NumPy and JAX.

`python -m benchmarks.accuracy` prints the tables and writes them into docs/numerics.md, and an excerpt into README.md.
The exact results come from the textbook formulas in extended precision (`numpy.longdouble`).
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import normfast as nf

OFFSETS = (0, 1e4, 1e6)
BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
ROOT = Path(__file__).parents[1]
EPS = 1e-5
GROUPS = 8
IMAGES = (16, 64, 28, 28)


@dataclass(frozen=True)
class Op:
    """A norm: seen in the shape `view`, it reduces `axes`, and its parameters have the shape `parameters`."""

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    axes: tuple[int, ...]
    parameters: tuple[int, ...]
    centred: bool = True


OPS = (
    Op("layer norm", (2048, 768), (2048, 768), (1,), (1, 768)),
    Op("RMS norm", (2048, 768), (2048, 768), (1,), (1, 768), centred=False),
    Op("group norm", IMAGES, (16, GROUPS, 8, 28, 28), (2, 3, 4), (1, GROUPS, 8, 1, 1)),
    Op("instance norm", IMAGES, IMAGES, (2, 3), (1, 64, 1, 1)),
    Op("batch norm", IMAGES, IMAGES, (0, 2, 3), (1, 64, 1, 1)),
)


@dataclass
class Sample:
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    dy: np.ndarray

    @classmethod
    def draw(cls, op, offset, rng):
        channels = int(np.prod(op.parameters))
        arrays = (
            offset + rng.standard_normal(op.shape),
            1 + 0.1 * rng.standard_normal(channels),
            0.1 * rng.standard_normal(channels) if op.centred else np.zeros(channels),
            rng.standard_normal(op.shape),
        )
        return cls(*(array.astype(np.float32) for array in arrays))


# ---- the libraries: each takes an op and a sample and returns y, dx, dweight


def textbook(op, sample, dtype):
    """Two passes over the data, everything in `dtype`."""
    x, dy = sample.x.astype(dtype).reshape(op.view), sample.dy.astype(dtype).reshape(op.view)
    weight, bias = (array.astype(dtype).reshape(op.parameters) for array in (sample.weight, sample.bias))
    over = tuple(axis for axis, size in enumerate(op.parameters) if size == 1)
    mean = partial(np.mean, axis=op.axes, keepdims=True)
    centred = x - mean(x) if op.centred else x
    rstd = 1 / np.sqrt(mean(centred * centred) + dtype(EPS))
    normalised = centred * rstd
    g = dy * weight
    dx = g - normalised * mean(g * normalised)
    if op.centred:
        dx = dx - mean(g)
    y = normalised * weight + bias
    return y.reshape(op.shape), (dx * rstd).reshape(op.shape), (dy * normalised).sum(axis=over).ravel()


def through_normfast(op, sample):
    x, weight, bias, dy = sample.x, sample.weight, sample.bias, sample.dy
    keywords = {"eps": EPS, "return_stats": True}
    if op.name == "RMS norm":
        y, rstd = nf.rms_norm(x, weight, **keywords)
        return y, *nf.rms_norm_backward(dy, x, rstd, weight)
    if op.name == "layer norm":
        y, mean, rstd = nf.layer_norm(x, weight, bias, **keywords)
        return y, *nf.layer_norm_backward(dy, x, mean, rstd, weight)[:2]
    if op.name == "group norm":
        y, mean, rstd = nf.group_norm(x, GROUPS, weight, bias, **keywords)
        return y, *nf.group_norm_backward(dy, x, mean, rstd, weight)[:2]
    if op.name == "instance norm":
        y, mean, rstd = nf.instance_norm(x, weight, bias, **keywords)
        return y, *nf.instance_norm_backward(dy, x, mean, rstd, weight)[:2]
    y, mean, rstd = nf.batch_norm(x, None, None, weight, bias, training=True, **keywords)
    return y, *nf.batch_norm_backward(dy, x, mean, rstd, weight)[:2]


def through_pytorch(op, sample):
    import torch
    from torch.nn import functional

    x, weight, bias = (torch.from_numpy(array).requires_grad_() for array in (sample.x, sample.weight, sample.bias))
    functions = {
        "layer norm": lambda: functional.layer_norm(x, weight.shape, weight, bias, EPS),
        "RMS norm": lambda: functional.rms_norm(x, weight.shape, weight, EPS),
        "group norm": lambda: functional.group_norm(x, GROUPS, weight, bias, EPS),
        "instance norm": lambda: functional.instance_norm(x, None, None, weight, bias, True, eps=EPS),
        "batch norm": lambda: functional.batch_norm(x, None, None, weight, bias, True, eps=EPS),
    }
    y = functions[op.name]()
    y.backward(torch.from_numpy(sample.dy))
    return y.detach().numpy(), x.grad.numpy(), weight.grad.numpy()


def through_jax(op, sample):
    """`jax.numpy` under `jit`, the variance by `var`, the gradients by automatic differentiation."""
    import jax

    def norm(x, weight, bias):
        x = x.reshape(op.view)
        if op.centred:
            moment = x.var(axis=op.axes, keepdims=True)
            x = x - x.mean(axis=op.axes, keepdims=True)
        else:
            moment = (x * x).mean(axis=op.axes, keepdims=True)
        y = x * jax.lax.rsqrt(moment + EPS) * weight.reshape(op.parameters) + bias.reshape(op.parameters)
        return y.reshape(op.shape)

    @jax.jit
    def forward_backward(x, weight, bias, dy):
        y, backward = jax.vjp(norm, x, weight, bias)
        return y, *backward(dy)[:2]

    return map(np.asarray, forward_backward(sample.x, sample.weight, sample.bias, sample.dy))


LIBRARIES: dict[str, Callable] = {
    "normfast": through_normfast,
    "PyTorch": through_pytorch,
    "NumPy": partial(textbook, dtype=np.float32),
    "JAX": through_jax,
}
PACKAGES = {"PyTorch": "torch", "NumPy": "numpy", "JAX": "jax"}


# ---- measuring


def ulps(op, sample, y, exact):
    """Largest error of y; one ulp is that of the largest |(x - mean)*rstd*weight| + |bias| in the reduction."""
    bias = sample.bias.reshape(op.parameters).astype(exact.dtype)
    exact = exact.reshape(op.view)
    largest = (np.abs(exact - bias) + np.abs(bias)).max(axis=op.axes, keepdims=True)
    return float((np.abs(y.reshape(op.view) - exact) / np.spacing(largest.astype(np.float32))).max())


def relative(gradient, exact):
    return float(np.linalg.norm((gradient - exact).ravel()) / np.linalg.norm(exact.ravel()))


def measure(libraries, samples, seed):
    """(op, offset) -> library -> the largest errors seen of y, dx and dweight."""
    errors = {}
    cells = [(op, offset) for op in OPS for offset in OFFSETS]
    for op, offset in track(cells, description="measuring"):
        rng = np.random.default_rng(seed)
        row = errors[op.name, offset] = dict.fromkeys(libraries, (0.0, 0.0, 0.0))
        for _ in range(samples):
            sample = Sample.draw(op, offset, rng)
            exact = textbook(op, sample, np.longdouble)
            for name in libraries:
                y, *gradients = LIBRARIES[name](op, sample)
                new = (ulps(op, sample, y, exact[0]), *map(relative, gradients, exact[1:]))
                row[name] = tuple(map(max, row[name], new))
    return errors


def installed():
    """The libraries found here, with their versions."""
    found = {"normfast": nf.__version__}
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except ModuleNotFoundError:
            Console().print(f"{name} is not installed; its column is left out.")
    return found


# ---- reporting

QUANTITIES = (
    ("y, largest error in ulp", lambda value: f"{value:.2f}" if value < 100 else f"{value:,.0f}"),
    ("dx, relative error in norm", lambda value: f"{value:.1e}"),
    ("dweight, relative error in norm", lambda value: f"{value:.1e}"),
)


def rows(errors, quantity):
    text = QUANTITIES[quantity][1]
    for (name, offset), row in errors.items():
        power = f"{offset:.0e}".replace("+0", "") if offset else "0"
        yield [name, power, *(text(values[quantity]) for values in row.values())]


def rich_table(errors, libraries, quantity):
    table = Table(title=QUANTITIES[quantity][0], title_justify="left")
    for heading in ("norm", "offset", *libraries):
        table.add_column(heading, justify="left" if heading == "norm" else "right")
    for row in rows(errors, quantity):
        table.add_row(*row)
    return table


def markdown_table(errors, libraries, quantity):
    lines = [QUANTITIES[quantity][0] + ":", "", "| " + " | ".join(("norm", "offset", *libraries)) + " |"]
    lines.append("|---|" + "---:|" * (len(libraries) + 1))
    lines += ["| " + " | ".join(row) + " |" for row in rows(errors, quantity)]
    return "\n".join(lines)


def caption(libraries, samples, seed):
    versions = ", ".join(f"{name} {number}" for name, number in libraries.items())
    code_path = nf.show_config(mode="dicts")["code_path"]
    text = (
        f"float32, data N(offset, 1), shape {OPS[0].shape} for layer and RMS norm, {IMAGES} for the others ({GROUPS} "
        f"groups); the largest of {samples} samples, seed {seed}. {versions}; code path of normfast: {code_path}. "
        "Written by `python -m benchmarks.accuracy`."
    )
    return textwrap.fill(text, 120)


def write(page, block):
    """Replace what stands between the two markers of the page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--samples", type=int, default=5, help="samples per norm and offset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/numerics.md lie")
    options = parser.parse_args()
    libraries = installed()
    errors = measure(libraries, options.samples, options.seed)
    console = Console()
    for quantity in range(len(QUANTITIES)):
        console.print(rich_table(errors, libraries, quantity))
    note = caption(libraries, options.samples, options.seed)
    tables = [markdown_table(errors, libraries, quantity) for quantity in range(len(QUANTITIES))]
    write(options.root / "docs" / "numerics.md", "\n\n".join([*tables, note]))
    some = {key: row for key, row in errors.items() if key[0] in ("layer norm", "batch norm")}
    write(options.root / "README.md", "\n\n".join([markdown_table(some, libraries, 0), note]))
    console.print(f"written: docs/numerics.md, README.md in {options.root}")


if __name__ == "__main__":
    main()
