"""The layers of the demo: gradients by finite differences, and normfast's norms against the plain ones."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

SHAPE = (6, 4, 4, 8)  # N, H, W, C
NORMS = ["BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm"]


@pytest.fixture(scope="module")
def digits():
    """The modules of the demo; they live in examples/, outside the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        return {name: import_module(f"examples.digits.{name}") for name in ("layers", "norms", "plain_norms")}


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def make(digits, name, rng):
    layers = digits["layers"]
    keywords = {"rng": rng, "dtype": np.float64}
    return {
        "Convolution": lambda: layers.Convolution(8, 5, **keywords),
        "ReLU": layers.ReLU,
        "AveragePool": layers.AveragePool,
        "Linear": lambda: layers.Linear(4 * 4 * 8, 10, **keywords),
        **{norm: lambda norm=norm: getattr(digits["norms"], norm)(SHAPE[1:], np.float64) for norm in NORMS},
    }[name]()


def slope(function, array, direction, h=1e-5):
    """Derivative of `function()` as `array` moves along `direction`."""
    start = array.copy()
    array[...] = start + h * direction
    above = function()
    array[...] = start - h * direction
    below = function()
    array[...] = start
    return (above - below) / (2 * h)


@pytest.mark.parametrize("name", ["Convolution", "ReLU", "AveragePool", "Linear", *NORMS])
def test_gradients_are_the_finite_differences(digits, rng, name):
    layer = make(digits, name, rng)
    x = rng.standard_normal(SHAPE)
    dy = rng.standard_normal(layer.forward(x, training=True).shape)
    dx = layer.backward(dy)
    gradients = [(x, dx), *((parameter.value, parameter.grad) for parameter in layer.parameters)]
    for array, gradient in gradients:
        direction = rng.standard_normal(array.shape)
        expected = slope(lambda: (layer.forward(x, training=True) * dy).sum(), array, direction)
        np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=1e-6, atol=1e-7)


def test_cross_entropy(digits, rng):
    logits, labels = rng.standard_normal((5, 10)), np.array([3, 1, 4, 1, 5])
    cross_entropy = digits["layers"].cross_entropy
    loss, gradient = cross_entropy(logits, labels)
    chosen = digits["layers"].softmax(logits)[np.arange(5), labels]
    np.testing.assert_allclose(loss, -np.log(chosen).mean(), rtol=1e-12)
    direction = rng.standard_normal(logits.shape)
    expected = slope(lambda: cross_entropy(logits, labels)[0], logits, direction)
    np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=1e-7)


@pytest.mark.parametrize("name", NORMS)
def test_norms_agree_with_plain_numpy(digits, rng, name):
    """Two steps of training and an evaluation, to rounding in float64."""
    ours, plain = (getattr(digits[module], name)(SHAPE[1:], np.float64) for module in ("norms", "plain_norms"))
    for norm_parameter, plain_parameter in zip(ours.parameters, plain.parameters, strict=True):
        norm_parameter.value[...] = plain_parameter.value[...] = rng.standard_normal(norm_parameter.value.shape)
    close = {"rtol": 1e-12, "atol": 1e-13}
    for _ in range(2):
        x, dy = rng.standard_normal((2, *SHAPE))
        np.testing.assert_allclose(ours.forward(x, True), plain.forward(x, True), **close)
        np.testing.assert_allclose(ours.backward(dy), plain.backward(dy), **close)
        for norm_parameter, plain_parameter in zip(ours.parameters, plain.parameters, strict=True):
            np.testing.assert_allclose(norm_parameter.grad, plain_parameter.grad, **close)
    np.testing.assert_allclose(ours.forward(x, False), plain.forward(x, False), **close)
