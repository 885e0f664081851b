"""Measuring: tasks that worker processes take from a list, each a few dozen to a few thousand samples."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict

import numpy as np

import normfast as nf

from ..shapes import Case
from . import exact
from .inputs import DTYPES, OPS, SIZES, Kind, Sample, draw, normal, power, samples
from .libraries import LIBRARIES, standardised

OFFSETS = (0.0, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6)
OFFSET_SAMPLES = 3
IMAGES, GROUPS = (8, 64, 28, 28), 8
STANDARD = (  # what peers are compared on
    Case("layer_norm", (512, 768)),
    Case("rms_norm", (512, 768)),
    Case("group_norm", IMAGES, groups=GROUPS),
    Case("instance_norm", IMAGES),
    Case("batch_norm", IMAGES),
)
ROWS = 65536  # terms of each parameter gradient of 16-bit data
TALL = (
    Case("layer_norm", (ROWS, 16)),
    Case("rms_norm", (ROWS, 16)),
    Case("group_norm", (ROWS // 16, 16, 16), groups=GROUPS),
    Case("instance_norm", (ROWS // 16, 16, 16)),
    Case("batch_norm", (ROWS // 16, 16, 16)),
)
# Half of the rows on average, or float16 would overflow.
TALL_KIND = Kind("dy near 0.5", normal(0.7), dy_mean=0.5, dy_scale=0.05)


def subject(sample: Sample) -> dict[str, exact.Error]:
    """Errors of normfast: of y, and of the gradients at the statistics that forward gave."""
    dtype = sample.case.dtype
    results = LIBRARIES["normfast"][1](sample)
    found = exact.errors(results, exact.solve(sample, results["stats"]), dtype)
    if dtype == "float32":
        # Forward and backward together. The statistics of float64 and of 16-bit data are of their precision.
        both = exact.errors(results, exact.solve(sample), dtype)
        found |= {f"{name} of both": both[name] for name in ("dx", "dweight") if name in both}
    return found


def worst(op: str, dtype: str, sizes: tuple[int, ...]) -> dict:
    """normfast over all kinds: the largest errors of each kind and size, and the inputs of the largest of all."""
    by_kind, largest = {}, {}
    count = 0
    for n in sizes:
        for kind, sample in samples(op, dtype, n):
            found = subject(sample)
            count += 1
            row = by_kind.setdefault(
                (kind.name, n), {"op": op, "dtype": dtype, "kind": kind.name, "n": n, "samples": 0}
            )
            row["samples"] += 1
            for quantity, error in found.items():
                for unit, value in asdict(error).items():
                    key = f"{quantity} {unit}"
                    row[key] = max(row.get(key, 0.0), value)
                    if value >= largest.get(key, (0.0, ""))[0]:
                        largest[key] = value, sample.label
    return {
        "kinds": list(by_kind.values()),
        "worst": [{"op": op, "dtype": dtype, "samples": count, "largest": largest}],
    }


def compared(sample: Sample, libraries: list[str]) -> dict[str, dict[str, exact.Error]]:
    """library -> quantity -> error."""
    want, found = exact.solve(sample), {}
    for name in libraries:
        if name == "scikit-learn":
            if sample.case.op == "batch_norm":
                table = standardised(sample)
                found[name] = exact.errors(LIBRARIES[name][1](table), {"y": exact.solve(table)["y"]}, "float32")
            continue
        results = LIBRARIES[name][1](sample)
        if results is not None:
            found[name] = exact.errors(results, want, "float32")
    return found


def beside(section: str, case: Case, mean: float, n: int, count: int, libraries: list[str]) -> dict:
    """All libraries on the same float32 samples of N(mean, 1): the largest errors."""
    kind, largest = Kind(f"offset {power(mean)}", normal(mean)), {}
    for number in range(count):
        for name, found in compared(draw(case, kind, number), libraries).items():
            row = largest.setdefault(name, {})
            for quantity, error in found.items():
                for unit, value in asdict(error).items():
                    row[f"{quantity} {unit}"] = max(row.get(f"{quantity} {unit}", 0.0), value)
    shape = list(case.shape)
    return {section: [{"op": case.op, "shape": shape, "offset": mean, "n": n, "samples": count, "libraries": largest}]}


def narrow(case: Case, dtype: str, libraries: list[str]) -> dict:
    """Parameter gradients of 16-bit data: the relative error in norm, rounding to 16 bits included."""
    sample = draw(Case(case.op, case.shape, dtype, groups=case.groups), TALL_KIND, 0)
    want, found = exact.solve(sample), {}
    for name in libraries:
        if name in ("ONNX Runtime", "scikit-learn"):
            continue  # have no backward
        results = LIBRARIES[name][1](sample)
        found[name] = {}
        for quantity in ("dweight", "dbias"):
            if quantity in want:
                value = want[quantity].value
                difference = results[quantity].astype(value.dtype).reshape(value.shape) - value
                found[name][quantity] = float(np.sqrt((difference**2).sum() / (value**2).sum()))
    return {"narrow": [{"op": case.op, "dtype": dtype, "shape": list(case.shape), "libraries": found}]}


def tasks(libraries: list[str], sizes: tuple[int, ...]) -> Iterator[tuple[Callable, tuple]]:
    """The long ones first."""
    for dtype in DTYPES:
        for op in OPS:
            yield worst, (op, dtype, sizes)
    for case in STANDARD:
        for mean in OFFSETS:
            yield beside, ("offset", case, mean, 0, OFFSET_SAMPLES, libraries)
    for mean in (0.0, 1e4):
        for n in sizes:
            few = min(64, max(1, 10**5 // n))
            yield beside, ("size", Case("layer_norm", (few, n)), mean, n, 1, libraries)
            if n > 1:
                yield beside, ("size", Case("batch_norm", (n, min(few, 16))), mean, n, 1, libraries)
    for case in TALL:
        for dtype in ("bfloat16", "float16"):
            yield narrow, (case, dtype, libraries)


def _quiet() -> None:
    nf.set_num_threads(1)
    try:
        import torch
    except ModuleNotFoundError:
        return
    torch.set_num_threads(1)


def run(libraries: list[str], most: int, processes: int, follow: Callable) -> dict[str, list]:
    """All tasks with up to `most` cells a reduction; `follow` wraps what waits for them, to show progress."""
    sections: dict[str, list] = {}
    todo = list(tasks(libraries, tuple(n for n in SIZES if n <= most)))
    # Fresh processes: JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_quiet) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in todo]
        for _ in follow(as_completed(futures), total=len(futures)):
            pass
    for future in futures:
        for section, rows in future.result().items():
            sections.setdefault(section, []).extend(rows)
    return sections
