"""Promises 4 and 5: NaN and infinity stay where they are; empty arrays; one-element reductions."""

from __future__ import annotations

import numpy as np
import pytest

import normfast as nf
from _cases import batch, data, group, instance, layer, rms
from _checks import BF16, DTYPES, F32, F64, assert_same_bits, same_bits, stat_dtype

# (case, number of reductions): enough of them side by side to share vectors and blocks.
CASES = [
    layer((21, 67)),
    layer((21, 3)),
    layer((67, 21), axis=0),
    layer((3, 67, 7), axis=1),
    layer((3, 5, 7, 4), axis=(0, 2)),
    rms((21, 67)),
    rms((67, 21), axis=0),
    group((3, 14, 9), 7),
    group((3, 9, 14), 7, channel_axis=-1),
    instance((3, 7, 19)),
    instance((3, 19, 7), channel_axis=-1),
    instance((3, 5, 5, 7), channel_axis=-1),
    batch((5, 21, 9)),
    batch((5, 9, 21), channel_axis=-1),
    batch((67, 21)),
    batch((5, 21, 9), training=False),
]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype, value):
    """One bad cell: its own reduction is lost, all others keep every bit."""
    x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
    want = case.forward(x, weight, bias, return_stats=True)
    cells = case.geometry.cells
    for reduction in (0, len(cells) // 2, len(cells) - 1):
        for place in (0, cells.shape[1] // 2, -1):
            bad = x.copy()
            bad.reshape(-1)[cells[reduction, place]] = value
            y, *stats = case.forward(bad, weight, bias, return_stats=True)
            others = np.delete(cells, reduction, axis=0)
            assert same_bits(y.reshape(-1)[others], want[0].reshape(-1)[others])
            if case.training:
                y = y.reshape(-1)[cells[reduction]].astype(F64)
                # As the formula has it: a mean or a variance that is not finite leaves no number but, in RMS norm
                # with an infinite cell, the zeros of the others.
                lost = np.isnan(y) | ((y == 0) if case.op == "rms_norm" and np.isinf(value) else False)
                assert lost.all()
                for stat, exact in zip(stats, want[1:], strict=True):
                    if stat is not None:
                        assert same_bits(
                            np.delete(stat.reshape(-1), reduction), np.delete(exact.reshape(-1), reduction)
                        )
            else:
                own = np.delete(cells[reduction], place)
                assert same_bits(y.reshape(-1)[own], want[0].reshape(-1)[own])
                assert not np.isfinite(y.reshape(-1)[cells[reduction, place]].astype(F64))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, dtype, value):
    """A bad cell of dy or of x, or a bad statistic, spoils dx of its own reduction only."""
    x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(dtype)
    mean, rstd = case.exact_stats(x)
    want = case.backward(dy, x, mean, rstd, weight)
    cells = case.geometry.cells
    for reduction in (0, len(cells) // 2, len(cells) - 1):
        others = np.delete(cells, reduction, axis=0)
        for which in ("dy", "x", "mean", "rstd"):
            arguments = {"dy": dy.copy(), "x": x.copy(), "mean": mean, "rstd": rstd.copy()}
            if which == "mean":
                if mean is None:
                    continue
                arguments["mean"] = mean.copy()
            where = reduction if which in ("mean", "rstd") else cells[reduction, -1]
            arguments[which].reshape(-1)[where] = np.nan if which in ("mean", "rstd") else value
            got = case.backward(**arguments, weight=weight)
            assert same_bits(got[0].reshape(-1)[others], want[0].reshape(-1)[others])
            if case.op == "batch_norm":
                for g, w in zip(got[1:], want[1:], strict=True):
                    assert same_bits(np.delete(g, reduction), np.delete(w, reduction))


@pytest.mark.parametrize("case", [c for c in CASES if c.op != "batch_norm"], ids=str)
def test_bad_parameters(case):
    """A NaN in one weight reaches the cells of that weight and no others; infinity in a bias likewise."""
    x, weight, bias = case.x(), case.weight(), case.bias()
    want = case.forward(x, weight, bias)
    hit = case.geometry.cells[case.geometry.params == 1]
    others = case.geometry.cells[case.geometry.params != 1]
    weight.reshape(-1)[1] = np.nan
    y = case.forward(x, weight, bias)
    assert np.isnan(y.reshape(-1)[hit]).all()
    assert_same_bits(y.reshape(-1)[others], want.reshape(-1)[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "stats"),
    [
        (layer((0, 8)), (0, 1)),
        (layer((0, 5, 8), axis=(1, 2)), (0, 1, 1)),
        (layer((5, 0, 8)), (5, 0, 1)),
        (layer((8, 0), axis=0), (1, 0)),
        (layer((4, 0, 8), axis=(0, 2)), (1, 0, 1)),
        (rms((0, 8)), (0, 1)),
        (rms((8, 0), axis=0), (1, 0)),
        (group((0, 6, 5), 3), (0, 3)),
        (group((0, 5, 6), 3, channel_axis=-1), (0, 3)),
        (instance((0, 6, 5)), (0, 6)),
        (instance((4, 0, 5)), (4, 0)),
        (instance((4, 5, 0), channel_axis=-1), (4, 0)),
        (batch((4, 0, 5)), (0,)),
        (batch((4, 5, 0), channel_axis=-1), (0,)),
    ],
    ids=str,
)
def test_no_reductions(case, stats, dtype):
    """Nothing to normalize: results of size zero, parameter gradients of zero."""
    x = np.empty(case.shape, dtype)
    weight = np.ones(case.param_shape, dtype)
    bias = weight.copy() if case.has_bias else None
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
    assert y.shape == case.shape
    assert y.dtype == dtype
    for stat in (mean, rstd):
        if stat is not None:
            assert stat.shape == stats
            assert stat.dtype == stat_dtype(dtype)
    out = np.empty(case.shape, dtype)
    assert case.forward(x, weight, bias, out=out) is out
    for w in (weight, None):
        dx, *gradients = case.backward(x, x, mean, rstd, w, needs=case.names)
        assert dx.shape == case.shape
        assert dx.dtype == dtype
        for g in gradients:
            assert_same_bits(g, np.zeros(case.param_shape, dtype))


@pytest.mark.parametrize(
    "case",
    [
        layer((8, 0)),
        layer((3, 0)),
        layer((0, 3), axis=0),
        layer((3, 0, 5), axis=(1, 2)),
        layer((3, 0, 5), axis=1),
        layer((0,), axis=0),
        rms((3, 0)),
        rms((0, 3), axis=0),
        group((3, 6, 0), 3),
        group((3, 0, 6), 3, channel_axis=-1),
        instance((3, 6, 0)),
        instance((3, 0, 6), channel_axis=-1),
        batch((0, 6)),
        batch((3, 6, 0)),
        batch((0, 5, 6), channel_axis=-1),
    ],
    ids=str,
)
def test_reductions_over_nothing(case):
    """A ValueError, also where the result would be empty; and so it is in backward."""
    x = np.empty(case.shape, F32)
    running = (np.zeros(6, F32), np.ones(6, F32)) if case.op == "batch_norm" else None
    kw = {"running": running} if running else {}
    with pytest.raises(ValueError, match=f"^{case.op}: x must .*got"):
        case.forward(x, **kw)
    if running:
        assert not running[0].any()
        assert (running[1] == 1).all()
    stats = np.zeros(case.stat_shape), np.ones(case.stat_shape)
    with pytest.raises(ValueError, match=f"^{case.op}_backward: x must .*got"):
        case.backward(x, x, *stats)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [layer((7, 1)), layer((1, 7), axis=0), group((3, 6), 6), group((3, 6, 1), 6), instance((3, 6, 1))], ids=str
)
def test_one_element(case, dtype):
    """The mean of one cell is the cell, the result is the bias, and the terms of dx cancel."""
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
    want = np.empty(case.shape, dtype)
    want.reshape(-1)[case.geometry.cells] = bias[case.geometry.params]
    assert_same_bits(y, want)
    assert_same_bits(mean.reshape(-1), x.astype(stat_dtype(dtype)).reshape(-1))
    np.testing.assert_allclose(rstd, 1 / np.sqrt(1e-5), rtol=1e-6)
    dx, dweight, _ = case.backward(dy, x, mean, rstd, weight)
    terms = case.exact_backward(dy, x, mean, rstd, weight).dx_terms
    assert np.linalg.norm(dx.astype(F64)) <= 1e-6 * terms
    assert not dweight.astype(F64).any()


def test_one_element_of_rms_norm():
    x = data((7, 1))
    np.testing.assert_allclose(nf.rms_norm(x, eps=0), np.sign(x), rtol=3e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_zero_and_signs(dtype):
    """Rows of zeros of either sign are constant."""
    x = np.array([[0.0, -0.0, 0.0], [-0.0, -0.0, -0.0]], dtype)
    for eps in (0.0, 1e-5):
        assert (nf.layer_norm(x, eps=eps) == 0).all()
        bias = np.array([1.0, -2.0, 3.0], dtype)
        assert_same_bits(nf.layer_norm(x, None, bias, eps=eps), np.stack([bias, bias]))


def test_no_warnings_from_bad_data():
    """Infinity and NaN are data: no floating-point warning, whatever NumPy is set to."""
    x = np.array([[np.inf, 1, 2], [np.nan, 1, 2], [3e38, -3e38, 3e38]], F32)
    with np.errstate(all="raise"):
        y, mean, rstd = nf.layer_norm(x, eps=0, return_stats=True)
        nf.layer_norm_backward(x, x, mean, rstd)
        nf.batch_norm(x, training=True)
    assert np.isnan(y[:2]).all()
    assert np.isfinite(y[2]).all()
