"""The norms as layers, through normfast. Input is channels last, (N, H, W, C).

Weight and bias have one value per channel for batch, group and instance norm, and one per cell of a sample for layer
and RMS norm, which normalise a whole sample at once. RMS norm has no bias. The same layers in NumPy: `plain_norms.py`.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

import normfast as nf

from .layers import Layer, Parameter

GROUPS = 4
SAMPLE = (1, 2, 3)  # the axes of one sample
EPS = 1e-5


class Norm(Layer):
    """Parameters and stop-watch of a norm; `_forward` and `_backward` are the norm itself."""

    per_channel = True
    has_bias = True

    def __init__(self, shape, dtype):
        shape = shape[-1:] if self.per_channel else shape
        self.weight = Parameter(np.ones(shape, dtype))
        self.bias = Parameter(np.zeros(shape, dtype))
        self.parameters = [self.weight, self.bias] if self.has_bias else [self.weight]
        self.seconds = 0.0  # spent in the norm while training

    def forward(self, x, training):
        start = perf_counter()
        y = self._forward(x, training)
        if training:
            self.seconds += perf_counter() - start
        return y

    def backward(self, dy):
        start = perf_counter()
        dx = self._backward(dy)
        self.seconds += perf_counter() - start
        return dx


class LayerNorm(Norm):
    per_channel = False

    def _forward(self, x, training):
        self.x = x
        y, self.mean, self.rstd = nf.layer_norm(
            x, self.weight.value, self.bias.value, axis=SAMPLE, eps=EPS, return_stats=True
        )
        return y

    def _backward(self, dy):
        dx, self.weight.grad, self.bias.grad = nf.layer_norm_backward(
            dy, self.x, self.mean, self.rstd, self.weight.value, axis=SAMPLE
        )
        return dx


class RMSNorm(Norm):
    per_channel = False
    has_bias = False

    def _forward(self, x, training):
        self.x = x
        y, self.rstd = nf.rms_norm(x, self.weight.value, axis=SAMPLE, eps=EPS, return_stats=True)
        return y

    def _backward(self, dy):
        dx, self.weight.grad = nf.rms_norm_backward(dy, self.x, self.rstd, self.weight.value, axis=SAMPLE)
        return dx


class GroupNorm(Norm):
    def _forward(self, x, training):
        self.x = x
        y, self.mean, self.rstd = nf.group_norm(
            x, GROUPS, self.weight.value, self.bias.value, channel_axis=-1, eps=EPS, return_stats=True
        )
        return y

    def _backward(self, dy):
        dx, self.weight.grad, self.bias.grad = nf.group_norm_backward(
            dy, self.x, self.mean, self.rstd, self.weight.value, channel_axis=-1
        )
        return dx


class InstanceNorm(Norm):
    def _forward(self, x, training):
        self.x = x
        y, self.mean, self.rstd = nf.instance_norm(
            x, self.weight.value, self.bias.value, channel_axis=-1, eps=EPS, return_stats=True
        )
        return y

    def _backward(self, dy):
        dx, self.weight.grad, self.bias.grad = nf.instance_norm_backward(
            dy, self.x, self.mean, self.rstd, self.weight.value, channel_axis=-1
        )
        return dx


class BatchNorm(Norm):
    def __init__(self, shape, dtype):
        super().__init__(shape, dtype)
        self.running_mean = np.zeros(shape[-1])
        self.running_var = np.ones(shape[-1])

    def _forward(self, x, training):
        self.x = x
        y, self.mean, self.rstd = nf.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight.value,
            self.bias.value,
            training=training,
            eps=EPS,
            channel_axis=-1,
            return_stats=True,
        )
        return y

    def _backward(self, dy):
        dx, self.weight.grad, self.bias.grad = nf.batch_norm_backward(
            dy, self.x, self.mean, self.rstd, self.weight.value, channel_axis=-1
        )
        return dx
