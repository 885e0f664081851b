"""Layers of a convolutional network in plain NumPy, channels last: x is (N, H, W, C).

Every layer has `forward(x, training)`, `backward(dy)` and a list `parameters`. `backward` stores the gradient of each
parameter in `Parameter.grad` and returns the gradient of the layer's input.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


class Parameter:
    """An array to learn, its gradient and the momentum that the optimiser keeps for it."""

    def __init__(self, value, *, decays=False):
        self.value = value
        self.grad = np.zeros_like(value)
        self.velocity = np.zeros_like(value)
        self.decays = decays  # weight decay is for the weights of convolutions and linear layers only


class Layer:
    parameters: list[Parameter] = []  # noqa: RUF012 - a layer without parameters shares this empty list


class Convolution(Layer):
    """3x3 convolution with zero padding and stride 1. It has no bias: the norm that follows would take it out again."""

    def __init__(self, channels_in, channels_out, *, rng, dtype, first=False):
        scale = np.sqrt(2 / (9 * channels_in))
        self.weight = Parameter(
            (rng.standard_normal((9 * channels_in, channels_out)) * scale).astype(dtype), decays=True
        )
        self.parameters = [self.weight]
        self.first = first  # nobody asks for the gradient of the images

    def forward(self, x, training):
        self.patches = patches3x3(x)
        return (self.patches @ self.weight.value).reshape(*x.shape[:3], -1)

    def backward(self, dy):
        shape = dy.shape
        dy = dy.reshape(-1, shape[-1])
        self.weight.grad = self.patches.T @ dy
        if self.first:
            return None
        # The gradient of the input is the convolution of dy with the kernel turned by 180 degrees.
        turned = self.weight.value.reshape(9, -1, shape[-1])[::-1].transpose(0, 2, 1).reshape(9 * shape[-1], -1)
        return (patches3x3(dy.reshape(shape)) @ turned).reshape(*shape[:3], -1)


def patches3x3(x):
    """The 3x3 neighbourhood of every pixel as one row: (N, H, W, C) becomes (N*H*W, 9*C)."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = sliding_window_view(padded, (3, 3), axis=(1, 2))  # (N, H, W, C, 3, 3)
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[-1])


class ReLU(Layer):
    def forward(self, x, training):
        self.mask = x > 0
        return x * self.mask

    def backward(self, dy):
        return dy * self.mask


class AveragePool(Layer):
    """Mean over 2x2 pixels."""

    def forward(self, x, training):
        n, h, w, c = x.shape
        return x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))

    def backward(self, dy):
        n, h, w, c = dy.shape
        quarter = (dy / 4)[:, :, None, :, None, :]
        return np.broadcast_to(quarter, (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


class Linear(Layer):
    """Fully connected layer on the flattened input."""

    def __init__(self, features_in, features_out, *, rng, dtype):
        weight = rng.standard_normal((features_in, features_out)) / np.sqrt(features_in)
        self.weight = Parameter(weight.astype(dtype), decays=True)
        self.bias = Parameter(np.zeros(features_out, dtype))
        self.parameters = [self.weight, self.bias]

    def forward(self, x, training):
        self.shape = x.shape
        self.x = x.reshape(len(x), -1)
        return self.x @ self.weight.value + self.bias.value

    def backward(self, dy):
        self.weight.grad = self.x.T @ dy
        self.bias.grad = dy.sum(axis=0)
        return (dy @ self.weight.value.T).reshape(self.shape)


class Network(Layer):
    """Layers one after the other."""

    def __init__(self, layers):
        self.layers = layers
        self.parameters = [parameter for layer in layers for parameter in layer.parameters]

    def forward(self, x, training):
        for layer in self.layers:
            x = layer.forward(x, training)
        return x

    def backward(self, dy):
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def cross_entropy(logits, labels):
    """Mean loss over the batch and its gradient with respect to the logits."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    loss = (np.log(np.exp(shifted).sum(axis=1)) - shifted[rows, labels]).mean()
    gradient = softmax(logits)
    gradient[rows, labels] -= 1
    return loss, gradient / len(labels)
