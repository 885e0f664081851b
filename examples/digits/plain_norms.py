"""The layers of `norms.py` in plain NumPy, as one writes them without a library: the yardstick for results and time."""

from __future__ import annotations

import numpy as np

from .norms import EPS, GROUPS, SAMPLE, Norm


class PlainNorm(Norm):
    """Any of the norms: they differ in the axes that they reduce. Keeps the normalised x for backward."""

    axes = SAMPLE
    centred = True

    def _forward(self, x, training):
        if self.centred:
            self.mean = x.mean(axis=self.axes, keepdims=True)
            x = x - self.mean
        self.var = np.square(x).mean(axis=self.axes, keepdims=True)
        self.rstd = 1 / np.sqrt(self.var + EPS)
        self.normalised = x * self.rstd
        return self._affine(self.normalised)

    def _affine(self, normalised):
        y = normalised * self.weight.value
        return y + self.bias.value if self.has_bias else y

    def _backward(self, dy):
        over = tuple(range(dy.ndim - self.weight.value.ndim))
        self.weight.grad = (dy * self.normalised).sum(axis=over)
        if self.has_bias:
            self.bias.grad = dy.sum(axis=over)
        return self._input_gradient(dy * self.weight.value, self.normalised)

    def _input_gradient(self, g, normalised):
        dx = g - normalised * (g * normalised).mean(axis=self.axes, keepdims=True)
        if self.centred:
            dx -= g.mean(axis=self.axes, keepdims=True)
        return dx * self.rstd


class LayerNorm(PlainNorm):
    per_channel = False


class RMSNorm(PlainNorm):
    per_channel = False
    has_bias = False
    centred = False


class InstanceNorm(PlainNorm):
    axes = (1, 2)


class GroupNorm(PlainNorm):
    """The groups become an axis of their own, (N, H, W, G, C/G), while the moments are taken."""

    axes = (1, 2, 4)

    def _forward(self, x, training):
        return super()._forward(split_groups(x), training)

    def _affine(self, normalised):
        self.normalised = normalised.reshape(*normalised.shape[:3], -1)
        return super()._affine(self.normalised)

    def _input_gradient(self, g, normalised):
        return super()._input_gradient(split_groups(g), split_groups(normalised)).reshape(g.shape)


def split_groups(x):
    return x.reshape(*x.shape[:3], GROUPS, -1)


class BatchNorm(PlainNorm):
    axes = (0, 1, 2)

    def __init__(self, shape, dtype):
        super().__init__(shape, dtype)
        self.running_mean = np.zeros(shape[-1])
        self.running_var = np.ones(shape[-1])

    def _forward(self, x, training):
        if not training:
            return self._affine((x - self.running_mean) / np.sqrt(self.running_var + EPS))
        y = super()._forward(x, training)
        count = x.size // x.shape[-1]
        self.running_mean = 0.9 * self.running_mean + 0.1 * self.mean.ravel()
        self.running_var = 0.9 * self.running_var + 0.1 * self.var.ravel() * count / (count - 1)
        return y
