"""Backward is the derivative of forward: central differences of the compiled float64 functions."""

from __future__ import annotations

import numpy as np
import pytest

from _cases import batch, group, instance, layer, rms
from _checks import F64

SMALL = [
    layer((3, 7)),
    layer((2, 3, 4), axis=(0, 2)),
    layer((5, 3), axis=0),
    rms((3, 7)),
    rms((2, 5, 3), axis=1),
    group((2, 6, 3), 2),
    group((2, 3, 6), 3, channel_axis=-1),
    instance((2, 3, 5)),
    instance((2, 5, 3), channel_axis=-1),
    batch((4, 3, 2)),
    batch((4, 2, 3), channel_axis=-1),
    batch((7, 3)),
    batch((4, 3, 2), training=False),
]


def differences(loss, a, step=1e-5):
    """Derivative of `loss` by every cell of `a`, changed in place one at a time and put back."""
    gradient = np.empty_like(a)
    for i in np.ndindex(a.shape):
        centre = a[i]
        a[i] = centre + step
        above = loss()
        a[i] = centre - step
        below = loss()
        a[i] = centre
        gradient[i] = (above - below) / (2 * step)
    return gradient


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients(case):
    x, dy, weight, bias = case.x(F64), case.dy(F64), case.weight(F64), case.bias(F64)
    _, mean, rstd = case.forward(x, weight, bias, return_stats=True)
    got = case.backward(dy, x, mean, rstd, weight)

    def loss():
        return float((case.forward(x, weight, bias) * dy).sum())

    for gradient, a in zip(got, (x, weight, bias), strict=False):
        np.testing.assert_allclose(gradient, differences(loss, a), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", [c for c in SMALL if c.op == "batch_norm" and c.training], ids=str)
def test_a_missing_term_shows(case):
    """Negative control: the gradient with the statistics held constant is not that of training."""
    x, dy = case.x(F64), case.dy(F64)
    _, mean, rstd = case.forward(x, return_stats=True)
    frozen = case.with_(training=False).backward(dy, x, mean, rstd)[0]
    numeric = differences(lambda: float((case.forward(x) * dy).sum()), x)
    assert not np.allclose(frozen, numeric, rtol=1e-3, atol=1e-3)
