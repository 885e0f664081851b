"""Two independent definitions must agree: `normfast.reference`, and the cell-by-cell one that the tests measure by."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from _cases import LAYOUTS, layer
from _checks import F64
from normfast import reference


def call_reference(case, monkeypatch, method, *args, **kw):
    """The same call of the case, on the functions of `normfast.reference`."""
    for name in reference.__all__:
        monkeypatch.setattr(f"normfast.{name}", getattr(reference, name))
    try:
        return getattr(case, method)(*args, **kw)
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_reference_agrees(case, weighted, monkeypatch):
    x, dy = case.x(F64), case.dy(F64)
    weight, bias = (case.weight(F64), case.bias(F64)) if weighted else (None, None)
    y, mean, rstd = call_reference(case, monkeypatch, "forward", x, weight, bias, return_stats=True)
    want = case.exact_forward(x, weight, bias)
    close = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(y, want.y.astype(F64), **close)
    np.testing.assert_allclose(rstd, want.rstd.astype(F64), **close)
    if mean is not None:
        np.testing.assert_allclose(mean, want.mean.astype(F64), **close)
    stats = case.exact_stats(x)
    got = call_reference(case, monkeypatch, "backward", dy, x, *stats, weight, needs=case.names)
    want = case.exact_backward(dy, x, *stats, weight)
    for g, name in zip(got, ("dx", "dweight", "dbias"), strict=False):
        np.testing.assert_allclose(g, getattr(want, name).astype(F64), **close)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_shapes_agree(case):
    assert case.param_shape == case.geometry.param_shape
    assert case.stat_shape == case.geometry.stat_shape


@pytest.mark.parametrize("offset", [0, 1e4, 1e8])
def test_exact_moments(offset):
    """The exact mean and variance far from zero, against Python's integers."""
    case = layer((1, 101))
    x = case.x(F64, mean=offset)
    cells = [Fraction(v) for v in x[0].tolist()]
    mean = sum(cells) / len(cells)
    var = sum((c - mean) ** 2 for c in cells) / len(cells)
    want = case.exact_forward(x, eps=0)
    assert abs(Fraction(*want.mean.item().as_integer_ratio()) - mean) <= abs(mean) * Fraction(1, 2**60) + Fraction(
        1, 2**60
    )
    assert abs(Fraction(*want.var.item().as_integer_ratio()) / var - 1) < Fraction(1, 2**55)
