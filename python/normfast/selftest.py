# SPDX-License-Identifier: BSD-3-Clause

"""The promises, tried on the machine at hand: `selftest`, or ``python -m normfast.selftest``.

Each code path runs in a process of its own, which is told by ``NORMFAST_ISA``. What it finds comes back as JSON: the
worst errors against long double, the promises that did not hold, and one digest per case, which must agree between the
paths that have fused multiply-add.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np

import normfast as nf

__all__ = ["selftest"]

LD = np.longdouble
# digits of the significand
DIGITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
# What is promised: ulps of the largest value of a reduction forward (16-bit results: of float32, beyond the one
# rounding), relative error in norm backward (for float64 nothing is promised; it stays far below this).
ULPS = {"float16": 3.0, "bfloat16": 3.0, "float32": 3.0, "float64": 16.0}
GRADIENT = {"float16": 1e-6, "bfloat16": 1e-6, "float32": 1e-6, "float64": 1e-12}
# The means of the data, beside a standard deviation of 1.3.
MEANS = {"float16": (0.7, 30.0), "bfloat16": (0.7, 30.0), "float32": (0.7, 1e6), "float64": (0.7, 1e4)}
SAME_BITS = ("x86-64-v3", "x86-64-v4", "arm64")


@dataclass(frozen=True)
class Case:
    """One norm in one layout. In the shape `cells` its reductions go over `over`; parameters have the shape `param`."""

    op: str
    shape: tuple[int, ...]
    where: dict[str, int] = field(default_factory=dict)
    cells: tuple[int, ...] = ()
    over: tuple[int, ...] = ()
    param: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = "".join(f", {name}={value}" for name, value in self.where.items())
        return f"{self.op} of {self.shape}{where}"

    @property
    def centred(self) -> bool:
        return self.op != "rms_norm"

    @property
    def names(self) -> tuple[str, ...]:
        return ("x", "weight", "bias")[: 3 if self.centred else 2]

    def forward(self, x: Any, weight: Any = None, bias: Any = None, **kw: Any) -> Any:
        """`y`, or with return_stats=True always y, mean, rstd."""
        where = dict(self.where)
        groups = (where.pop("num_groups"),) if self.op == "group_norm" else ()
        parameters = {"weight": weight} | ({"bias": bias} if self.centred else {})
        if self.op == "batch_norm":
            kw["training"] = True
        result = getattr(nf, self.op)(x, *groups, **parameters, **where, **kw)
        if kw.get("return_stats") and not self.centred:
            return result[0], None, result[1]
        return result

    def backward(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any = None) -> Any:
        where = {name: value for name, value in self.where.items() if name != "num_groups"}
        stats = (mean, rstd) if self.centred else (rstd,)
        return getattr(nf, f"{self.op}_backward")(dy, x, *stats, weight, needs=self.names, **where)


def rows(op: str, count: int, width: int) -> Case:
    return Case(op, (count, width), {"axis": -1}, (count, width), (1,), (1, width))


def _cases() -> list[Case]:
    image, last = (3, 32, 7, 9), (3, 7, 9, 32)
    return [
        *(rows("layer_norm", 37, width) for width in (2, 16, 33, 100, 768)),
        rows("layer_norm", 3, 40_009),
        Case("layer_norm", (3, 96, 7, 9), {"axis": 1}, (3, 96, 63), (1,), (1, 96, 1)),
        *(rows("rms_norm", 37, width) for width in (16, 100, 768)),
        Case("group_norm", image, {"num_groups": 8}, (3, 8, 4, 63), (2, 3), (1, 8, 4, 1)),
        Case("group_norm", last, {"num_groups": 8, "channel_axis": -1}, (3, 63, 8, 4), (1, 3), (1, 1, 8, 4)),
        Case("instance_norm", image, {}, (3, 32, 63), (2,), (1, 32, 1)),
        Case("instance_norm", last, {"channel_axis": -1}, (3, 63, 32), (1,), (1, 1, 32)),
        Case("batch_norm", image, {}, (3, 32, 63), (0, 2), (1, 32, 1)),
        Case("batch_norm", last, {"channel_axis": -1}, (189, 32), (0,), (1, 32)),
    ]


# Large enough for all threads, with sizes that share out unevenly.
SHARED = [
    rows("layer_norm", 4099, 257),
    rows("layer_norm", 3, 340_007),
    rows("rms_norm", 4099, 257),
    Case("group_norm", (5, 24, 93, 91), {"num_groups": 6}),
    Case("instance_norm", (5, 24, 93, 91)),
    Case("batch_norm", (7, 19, 89, 87)),
    Case("batch_norm", (20_011, 51), {"channel_axis": -1}),
]


def _dtypes() -> dict[str, np.dtype[Any]]:
    names = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
    try:
        bfloat16 = import_module("ml_dtypes").bfloat16
    except ModuleNotFoundError:
        return names
    return names | {"bfloat16": np.dtype(bfloat16)}


def _data(shape: tuple[int, ...], dtype: Any, seed: int, mean: float = 0.7, std: float = 1.3) -> Any:
    return (np.random.Generator(np.random.PCG64(seed)).standard_normal(shape) * std + mean).astype(dtype)


def _parameters(case: Case, dtype: Any) -> tuple[Any, Any]:
    count = (
        math.prod(case.param) if case.param else case.shape[case.where.get("channel_axis", case.where.get("axis", 1))]
    )
    return _data((count,), dtype, 2, 1.0, 0.3), _data((count,), dtype, 3, 0.1, 0.3) if case.centred else None


def _exact(a: Any) -> Any:
    return np.asarray(a).astype(np.float64).astype(LD)


def _ulp(values: Any, name: str) -> Any:
    _, exponent = np.frexp(np.abs(values))
    return np.ldexp(LD(1), exponent - DIGITS[name])


def _beyond_rounding(error: Any, got: Any, name: str) -> Any:
    """What is left of the error of a 16-bit result after its one rounding."""
    return np.maximum(error - _ulp(_exact(got), name) / 2, 0) if DIGITS[name] < 24 else error


def forward_error(case: Case, y: Any, x: Any, weight: Any, bias: Any, eps: float, name: str) -> float:
    """In ulps of the largest value of each reduction."""
    cells = _exact(x).reshape(case.cells)
    mean = cells.mean(axis=case.over, keepdims=True) if case.centred else LD(0)
    centred = cells - mean
    var = (centred * centred).mean(axis=case.over, keepdims=True)
    scaled = centred / np.sqrt(var + LD(eps)) * _exact(weight).reshape(case.param)
    shift = _exact(bias).reshape(case.param) if bias is not None else LD(0)
    largest = (abs(scaled) + abs(shift)).max(axis=case.over, keepdims=True)
    error = _beyond_rounding(abs(_exact(y).reshape(case.cells) - (scaled + shift)), y.reshape(case.cells), name)
    return float((error / _ulp(largest, name if DIGITS[name] >= 24 else "float32")).max())


def gradient_errors(case: Case, got: Any, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, name: str) -> list[float]:
    """Each gradient's error over its size, in norm; over its terms where they cancel."""
    keep = tuple(1 if i in case.over else n for i, n in enumerate(case.cells))
    cells, slope = _exact(x).reshape(case.cells), _exact(dy).reshape(case.cells)
    if case.centred:
        cells = cells - _exact(mean).reshape(keep)
    scale = _exact(rstd).reshape(keep)
    xhat, g = cells * scale, slope * _exact(weight).reshape(case.param)
    inner = g - xhat * (g * xhat).mean(axis=case.over, keepdims=True)
    if case.centred:
        inner = inner - g.mean(axis=case.over, keepdims=True)
    along = tuple(i for i, n in enumerate(case.param) if n == 1)
    exact = [(inner * scale, g * scale)]
    exact += [(part.sum(axis=along), abs(part).sum(axis=along)) for part in (slope * xhat, slope)]
    errors = []
    for result, (want, terms) in zip(got, exact, strict=False):
        result = result.reshape(want.shape)
        error = np.sqrt((_beyond_rounding(abs(_exact(result) - want), result, name) ** 2).sum())
        size, cancelling = np.sqrt((want**2).sum()), np.sqrt((terms**2).sum())
        errors.append(float(error / (size if size > cancelling / 10 else cancelling)))
    return errors


def _same(a: Any, b: Any) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def _all_same(some: Any, others: Any) -> bool:
    return all(_same(a, b) for a, b in zip(some, others, strict=True))


def _all_results(case: Case, x: Any, dy: Any, weight: Any, bias: Any) -> tuple[Any, ...]:
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
    return (y, mean, rstd, *case.backward(dy, x, mean, rstd, weight))


class Findings:
    """What one code path gave."""

    def __init__(self) -> None:
        self.worst: dict[str, list[float]] = {}  # "op dtype": worst error forward, backward
        self.failures: list[str] = []
        self.digests: dict[str, str] = {}
        self.checks = 0

    def promise(self, holds: bool, otherwise: str) -> None:
        self.checks += 1
        if not holds:
            self.failures.append(otherwise)

    def accuracy(self) -> None:
        wide = np.finfo(LD).nmant > 52
        for name, dtype in _dtypes().items():
            for case in _cases():
                weight, bias = _parameters(case, dtype)
                dy = _data(case.shape, dtype, 1, 0.05, 1.0)
                sha = hashlib.sha256()
                for mean in MEANS[name]:
                    x = _data(case.shape, dtype, 0, mean)
                    results = _all_results(case, x, dy, weight, bias)
                    for array in results:
                        sha.update(array.tobytes() if array is not None else b"")
                    if name == "float64" and not wide:
                        continue  # nothing wider to compare with
                    y, mean_out, rstd, *gradients = results
                    ulps = forward_error(case, y, x, weight, bias, 1e-5 if case.centred else 1e-6, name)
                    slopes = max(gradient_errors(case, gradients, dy, x, mean_out, rstd, weight, name))
                    self.promise(ulps <= ULPS[name], f"{case}, {name}, mean {mean:g}: y is off by {ulps:.3g} ulp")
                    self.promise(
                        slopes <= GRADIENT[name], f"{case}, {name}, mean {mean:g}: gradients off by {slopes:.1e}"
                    )
                    worst = self.worst.setdefault(f"{case.op} {name}", [0.0, 0.0])
                    worst[:] = [max(worst[0], ulps), max(worst[1], slopes)]
                self.digests[f"{case}, {name}"] = sha.hexdigest()

    def constants(self) -> None:
        for name, dtype in _dtypes().items():
            for case in _cases():
                weight, bias = _parameters(case, dtype)
                for eps in (0.0, 1e-5):
                    y = case.forward(np.full(case.shape, 3.3, dtype), weight, bias, eps=eps)
                    if case.centred:
                        want = np.broadcast_to(bias.reshape(case.param), case.cells)
                        self.promise(
                            bool((y.reshape(case.cells) == want).all()),
                            f"{case}, {name}: constant data give not the bias",
                        )

    def threads(self) -> list[int]:
        counts = sorted({1, 2, 3, nf.get_num_threads(), (os.cpu_count() or 1) + 1})
        for case in SHARED:
            x, dy = _data(case.shape, np.float32, 0), _data(case.shape, np.float32, 1, 0.05)
            weight, bias = _parameters(case, np.float32)
            want = None
            for count in counts:
                with nf.threads(count):
                    results = _all_results(case, x, dy, weight, bias)
                want = want or results
                self.promise(_all_same(results, want), f"{case}: other bits with {count} threads than with {counts[0]}")
        return counts

    def layouts(self) -> None:
        for case in _cases():
            x, (weight, bias) = _data(case.shape, np.float32, 0), _parameters(case, np.float32)
            want = case.forward(x, weight, bias)
            for what, other in _views(x):
                y = case.forward(other, weight, bias)
                self.promise(bool((y == want).all()), f"{case}: other values for {what} x")
            out = np.zeros((*case.shape[:-1], 2 * case.shape[-1]), np.float32)
            case.forward(x, weight, bias, out=out[..., ::2])
            self.promise(_same(out[..., ::2].copy(), want), f"{case}: other bits in a strided out")
            self.promise(not out[..., 1::2].any(), f"{case}: writes between the cells of a strided out")
            case.forward(x, weight, bias, out=x)
            self.promise(_same(x, want), f"{case}: other bits in place")

    def neighbours(self) -> None:
        """The bits of a row do not depend on the others, whatever they hold."""
        for case in (rows("layer_norm", 37, 100), rows("rms_norm", 37, 768)):
            x, dy = _data(case.shape, np.float32, 0), _data(case.shape, np.float32, 1)
            y, mean, rstd = case.forward(x, return_stats=True)
            dx = case.backward(dy, x, mean, rstd)[0]
            for i in (0, 15, 36):
                one = slice(i, i + 1)
                alone = rows(case.op, 1, case.shape[1])
                y1, mean1, rstd1 = alone.forward(x[one], return_stats=True)
                same = _same(y1, y[one]) and _same(alone.backward(dy[one], x[one], mean1, rstd1)[0], dx[one])
                self.promise(same, f"{case}: other bits for row {i} alone")
            x[7] = np.nan
            bad = case.forward(x)
            others = np.delete(np.arange(37), 7)
            self.promise(_same(bad[others], y[others]) and bool(np.isnan(bad[7]).all()), f"{case}: NaN leaves its row")


def _views(x: Any) -> Iterator[tuple[str, Any]]:
    yield "a byteswapped", x.astype(x.dtype.newbyteorder())
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    yield "a strided", wide[..., ::2]
    yield "a reversed", x[..., ::-1].copy()[..., ::-1]
    odd = np.frombuffer(np.zeros(x.nbytes + 1, np.uint8), x.dtype, x.size, 1).reshape(x.shape)
    odd[...] = x
    yield "a misaligned", odd


def examine() -> dict[str, Any]:
    """All checks, on the code path of this process."""
    found = Findings()
    found.accuracy()
    found.constants()
    found.layouts()
    found.neighbours()
    counts = found.threads()
    return {
        "code_path": nf.show_config("dicts")["code_path"],
        "checks": found.checks,
        "worst": found.worst,
        "failures": found.failures,
        "digests": found.digests,
        "threads": counts,
    }


def _examine_elsewhere(path: str) -> dict[str, Any] | str:
    """The findings of a child on one code path, or why there are none."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import json; from normfast.selftest import examine; "
        "print(json.dumps(examine()))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"NORMFAST_ISA": path},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it did not come to an end"
    if done.returncode != 0:
        return done.stderr.strip().rpartition("\n")[2] or f"ended with status {done.returncode}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def selftest() -> bool:
    """Try the promises on this machine, print what came out, and say whether all held.

    Every code path that this CPU can run computes every norm, forward and backward, in float16, float32, float64 and,
    where ml_dtypes is installed, bfloat16. The results are compared with long double; with those of other numbers of
    threads, other layouts in memory, and rows by themselves; and between code paths. Takes some seconds for each path.
    The same from a shell, with the answer as exit status: ``python -m normfast.selftest``.

    Returns
    -------
    bool
        Whether every promise held.

    See Also
    --------
    show_config : How normfast was built and how it is set.

    Notes
    -----
    Printed are, for each norm and dtype, the largest error of `y`, in ulp of the largest value of its row, group or
    channel (of 16-bit results: in float32 ulp, what lies beyond their one rounding), and the largest relative error of
    a gradient, in norm. Every process uses the same data.
    """
    start = time.perf_counter()
    config = nf.show_config("dicts")
    print(
        f"normfast {config['version']}, built by {config['compiler']}; NumPy {config['numpy']}, Python "
        f"{sys.version.split()[0]}, {sys.platform}, {os.cpu_count()} CPUs"
    )
    good, examined = True, []
    for path in config["code_paths"]:
        found = _examine_elsewhere(path)
        if isinstance(found, str):
            lacking = "cannot run" in found
            good = good and lacking
            print(f"{path}: {'not run, this CPU lacks it' if lacking else f'FAILED: {found}'}")
            continue
        examined.append(found)
        good = good and not found["failures"] and found["code_path"] == path
        _print_findings(path, found)
    alike = [found for found in examined if found["code_path"] in SAME_BITS]
    for one, other in pairwise(alike):
        differ = [case for case, digest in one["digests"].items() if other["digests"][case] != digest]
        good = good and not differ
        verdict = f"FAILED, other bits for {len(differ)} cases: {differ[0]}" if differ else "the same bits"
        print(f"{one['code_path']} and {other['code_path']}: {verdict}")
    good = good and bool(examined)
    print(f"{'Every promise held' if good else 'A PROMISE WAS BROKEN'} ({time.perf_counter() - start:.0f} s).")
    return good


def _print_findings(path: str, found: dict[str, Any]) -> None:
    names = list(dict.fromkeys(key.split()[1] for key in found["worst"]))
    ops = list(dict.fromkeys(key.split()[0] for key in found["worst"]))
    print(f"\n{path}: {found['checks']} checks, threads {', '.join(map(str, found['threads']))}")
    print(f"  {'worst ulp of y, error of gradients':<36}" + "".join(f"{name:>18}" for name in names))
    for op in ops:
        cells = (found["worst"].get(f"{op} {name}") for name in names)
        print(f"  {op:<36}" + "".join(f"{cell[0]:>9.2f} {cell[1]:>8.0e}" if cell else f"{'-':>18}" for cell in cells))
    for failure in found["failures"][:10]:
        print(f"  FAILED: {failure}")
    if len(found["failures"]) > 10:
        print(f"  and {len(found['failures']) - 10} more")


class _CallableModule(types.ModuleType):
    """`normfast.selftest` is the function; who imports the module of that name first finds this in its place."""

    def __call__(self) -> bool:
        return selftest()


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(0 if selftest() else 1)
