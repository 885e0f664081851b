"""Every input there is: rows of one cell over all of float32, rows of two over all pairs of 16-bit numbers.

The exact results are float64: sums and products of such numbers are exact there or rounded once, so they are off by
less than 2^-50 of themselves, a millionth of a float32 ulp. The fast tests take a slice, `make proof` takes all; the
figures of docs/numerics.md that say "bound, exhaustive" are the limits in here, and `-rP` prints what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import normfast as nf
from _checks import BF16, F16, F32, F64, NARROW, ulp

STEP = 65521  # a prime, for the slices of float32: every exponent, and low bits of all kinds
BLOCK = 1 << 16  # rows: what is computed of them stays in the second-level cache
PROOF = [pytest.mark.slow, pytest.mark.proof]
PROMISED = 3  # float32 ulps of the largest value of a row; 16-bit results: beyond half an ulp of their own
ALL_FLOAT32 = 1 << 32
SLICE = (ALL_FLOAT32 - 1) // STEP + 1


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def wide(cells):
    """float64 values; some bit patterns are signalling NaNs, of which NumPy would warn."""
    with np.errstate(invalid="ignore"):
        return cells.astype(F64)


def every(dtype, step):
    """Every `step`th bit pattern of the dtype, in blocks."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    end = 1 << (8 * dtype.itemsize)
    for start in range(0, end, BLOCK * step):
        yield np.arange(start, min(start + BLOCK * step, end), step, dtype=np.int64).astype(unsigned).view(dtype)


def quick_ulp(values, dtype):
    """`_checks.ulp` of float64 values, from their exponents: in long double 2^32 of them would take an hour."""
    digits, least = {F16: (11, -14), BF16: (8, -126), F32: (24, -126)}[dtype]
    power = (values.view(np.int64) & (0x7FF << 52)).view(F64)
    return np.maximum(power, 2.0**least) * 2.0 ** (1 - digits)


def test_quick_ulp():
    values = np.array([1e-45, 1e-39, 0.3, -0.5, 1, np.nextafter(1, 0), -3e38, 65504])
    for dtype in (F16, BF16, F32):
        assert (quick_ulp(values, dtype) == ulp(values, dtype)).all()
        assert quick_ulp(np.zeros(1), dtype) == np.array(1, f"u{dtype.itemsize}").view(dtype).astype(F64)


@dataclass
class Seen:
    """The largest error so far in float32 ulps, and the row that gave it."""

    rows: int = 0
    ulps: float = 0.0
    row: list | None = None
    misrounded: int = 0  # 16-bit results that are not the nearest number to the exact one

    def add(self, got, want, largest, x):
        """One cell of each row: what came, the exact result, the size by which ulps are measured."""
        got = wide(got)
        special = ~np.isfinite(want)
        if special.any():
            np.testing.assert_array_equal(got[special], want[special])
        with np.errstate(invalid="ignore"):
            error = np.abs(got - want)
        error[special] = 0
        if x.dtype == F32:
            self._largest(error / quick_ulp(largest, F32), x)
            return
        unit = quick_ulp(want, x.dtype)
        # The float64 result may be on the wrong side of the middle between two numbers by a little; not by this much.
        wrong = np.flatnonzero(error > unit * (0.5 + 1e-9))
        if wrong.size:
            self.misrounded += wrong.size
            beyond = error[wrong] - unit[wrong] / 2
            self._largest(beyond / quick_ulp(largest[wrong], F32), x[wrong])

    def _largest(self, error, x):
        worst = error.argmax()
        if error[worst] > self.ulps:
            self.ulps, self.row = float(error[worst]), x[worst].tolist()

    def report(self, what):
        misrounded = f", {self.misrounded} results not the nearest number" if self.misrounded else ""
        print(f"{what}: {self.rows} rows, largest error {self.ulps:.4f} ulp, of {self.row}{misrounded}")
        assert self.ulps <= PROMISED


# ---- rows of one cell, or of equal ones


def constant_rows(dtype, step, width, axis, eps):
    """Exactly the bias, NaN where the cell is no finite number; the mean is the cell; counts the rows."""
    bias = np.linspace(-1.7, 0.3, width).astype(dtype)
    rows = 0
    for cell in every(dtype, step):
        x = np.repeat(cell[:, None], width, axis=1) if axis else np.repeat(cell[None], width, axis=0)
        y, mean, rstd = nf.layer_norm(x, None, bias, axis=axis, eps=eps, return_stats=True)
        y, mean, rstd = wide(y if axis else y.T), mean.reshape(-1), rstd.reshape(-1)
        cell = wide(cell)
        finite = np.isfinite(cell)
        if not finite.all():
            assert np.isnan(y[~finite]).all()
            cell, y, mean, rstd = (a[finite] for a in (cell, y, mean, rstd))
        assert (y == wide(bias)).all()
        assert (mean == cell).all()
        assert (rstd == (rstd.dtype.type(1 / np.sqrt(eps)) if eps else np.inf)).all()
        rows += finite.size
    return rows


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(("dtype", "step", "rows"), [(F16, 1, 1 << 16), (BF16, 1, 1 << 16), (F32, STEP, SLICE)])
def test_constant_rows(dtype, step, rows, width, axis):
    assert constant_rows(dtype, step, width, axis, 0.0) == rows
    assert constant_rows(dtype, step, width, axis, 1e-5) == rows


@pytest.mark.parametrize("width", [pytest.param(width, marks=PROOF) for width in (1, 3)])
def test_constant_rows_of_all_float32(width):
    assert constant_rows(F32, 1, width, 1, 1e-5) == ALL_FLOAT32


def test_a_constant_that_leaks_would_show(monkeypatch):
    """Negative control: a mean that is off in the last bit, for one value of all."""

    def leaking(x, *args, **kw):
        y, mean, rstd = layer_norm(x, *args, **kw)
        mean[x == np.float16(0.1)] *= 1 + 1e-7
        return y, mean, rstd

    layer_norm = nf.layer_norm
    monkeypatch.setattr(nf, "layer_norm", leaking)
    with pytest.raises(AssertionError):
        constant_rows(F16, 1, 1, 1, 1e-5)


def rms_of_one(dtype, step, eps, axis=1):
    """x/sqrt(x^2 + eps); what is not finite has no RMS norm."""
    seen = Seen()
    for cell in every(dtype, step):
        y = nf.rms_norm(cell[:, None] if axis else cell[None], axis=axis, eps=eps).reshape(-1)
        x = wide(cell)
        with np.errstate(invalid="ignore"):
            root = np.sqrt(x * x + eps)
            root[root == 0] = 1  # a zero at eps=0 stays zero
            want = x / root
        seen.add(y, want, want, cell)
        seen.rows += len(cell)
    return seen


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("eps", [1e-6, 0.0, 1e-30, 1.0])
@pytest.mark.parametrize(("dtype", "step", "rows"), [(F16, 1, 1 << 16), (BF16, 1, 1 << 16), (F32, STEP, SLICE)])
def test_rms_of_one(dtype, step, rows, eps, axis):
    seen = rms_of_one(dtype, step, eps, axis)
    seen.report(f"RMS norm of one {dtype}, eps={eps}")
    assert seen.rows == rows


@pytest.mark.parametrize("eps", [pytest.param(eps, marks=PROOF) for eps in (1e-6, 0.0)])
def test_rms_of_every_float32(eps):
    seen = rms_of_one(F32, 1, eps)
    seen.report(f"RMS norm of one float32, eps={eps}")
    assert seen.rows == ALL_FLOAT32


def evaluation(step, mean, var, weight, bias):
    """Batch norm by running statistics, a map of each cell alone; an ulp here is that of the cell's own result."""
    arrays = [np.array([a], F32) for a in (mean, var, weight, bias)]
    mean, var, weight, bias = map(wide, arrays)
    seen = Seen()
    for cell in every(F32, step):
        y = nf.batch_norm(cell[:, None], *arrays).reshape(-1)
        scaled = (wide(cell) - mean) / np.sqrt(var + 1e-5) * weight
        seen.add(y, scaled + bias, np.abs(scaled) + np.abs(bias), cell)
        seen.rows += len(cell)
    return seen


# rstd*weight is at most one: no finite float32 goes past the largest.
RUNNING = [(0.3, 2.5, 1.2, -0.4), (-1e6, 7.0, -0.7, 1e3)]


@pytest.mark.parametrize("running", RUNNING, ids=str)
def test_evaluation_of_one(running):
    seen = evaluation(STEP, *running)
    seen.report(f"batch norm of one float32, running mean, variance, weight, bias {running}")
    assert seen.rows == SLICE


@pytest.mark.parametrize("running", [pytest.param(running, marks=PROOF) for running in RUNNING[:1]], ids=str)
def test_evaluation_of_every_float32(running):
    seen = evaluation(1, *running)
    seen.report(f"batch norm of one float32, running mean, variance, weight, bias {running}")
    assert seen.rows == ALL_FLOAT32


# ---- rows of two cells


def layer_of_two(a, b, eps):
    """The cells lie half their difference to either side of the mean."""
    half = (a - b) / 2
    root = np.sqrt(half * half + eps)
    root[root == 0] = 1
    half /= root
    return half, -half


def rms_of_two(a, b, eps):
    root = np.sqrt((a * a + b * b) / 2 + eps)
    root[root == 0] = 1
    return a / root, b / root


TWO = {"layer_norm": layer_of_two, "rms_norm": rms_of_two}


def pairs(op, dtype, eps, step, axis=1):
    """Every `step`th number beside every number."""
    function = getattr(nf, op)
    number = np.arange(1 << 16).astype(np.uint16).view(dtype)
    values = wide(number)
    rows = np.stack([number, number], axis=1)
    seen = Seen()
    for first in range(0, 1 << 16, step):
        rows[:, 0] = number[first]
        y = function(rows, eps=eps) if axis else function(rows.T.copy(), axis=0, eps=eps).T
        with np.errstate(invalid="ignore"):
            want = TWO[op](values[first], values, eps)
            largest = np.maximum(np.abs(want[0]), np.abs(want[1]))
        for cell in (0, 1):
            seen.add(y[:, cell], want[cell], largest, rows)
        seen.rows += len(rows)
    return seen


PAIRS = [("layer_norm", 1e-5), ("layer_norm", 0.0), ("rms_norm", 1e-6), ("rms_norm", 0.0)]


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("op", "eps"), PAIRS)
def test_pairs(op, eps, dtype, axis):
    seen = pairs(op, dtype, eps, 21841, axis)
    seen.report(f"{op} of two {dtype}, eps={eps}")
    assert seen.rows == 4 << 16


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=PROOF) for dtype in NARROW], ids=str)
@pytest.mark.parametrize(("op", "eps"), PAIRS)
def test_all_pairs(op, eps, dtype):
    seen = pairs(op, dtype, eps, 1)
    seen.report(f"{op} of two {dtype}, eps={eps}")
    assert seen.rows == 1 << 32


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_wrong_neighbour_would_show(dtype, monkeypatch):
    """Negative control: one result of 65536 is the next number."""

    def nudging(x, **kw):
        y = layer_norm(x, **kw)
        y.view(np.uint16)[12345, 1] += 1
        return y

    layer_norm = nf.layer_norm
    monkeypatch.setattr(nf, "layer_norm", nudging)
    seen = pairs("layer_norm", dtype, 1e-5, 1 << 15)
    assert seen.ulps > 2**10
    with pytest.raises(AssertionError):
        seen.report("nudged")
