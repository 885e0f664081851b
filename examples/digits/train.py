"""The data, the network, the optimiser and the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from . import norms, plain_norms
from .layers import AveragePool, Convolution, Linear, Network, ReLU, cross_entropy, softmax

# name -> (layer through normfast, the same layer in plain NumPy)
NORMS = {
    "batch norm": (norms.BatchNorm, plain_norms.BatchNorm),
    "layer norm": (norms.LayerNorm, plain_norms.LayerNorm),
    "group norm": (norms.GroupNorm, plain_norms.GroupNorm),
    "instance norm": (norms.InstanceNorm, plain_norms.InstanceNorm),
    "RMS norm": (norms.RMSNorm, plain_norms.RMSNorm),
}

BATCH = 64
LEARNING_RATE = 0.02
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
TEST_SHARE = 1 / 3


@dataclass
class Digits:
    """Real handwritten digits, 8x8 pixels in [0, 1], split into a training and a test part of like composition."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @classmethod
    def load(cls, seed, dtype):
        images, labels = load_digits(return_X_y=True)
        images = (images / 16).reshape(-1, 8, 8, 1).astype(dtype)
        train_images, test_images, train_labels, test_labels = train_test_split(
            images, labels, test_size=TEST_SHARE, stratify=labels, random_state=seed
        )
        return cls(train_images, train_labels, test_images, test_labels)


@dataclass
class Run:
    """A network in training, and what is known about it so far."""

    network: Network
    norms: list[norms.Norm]
    step_losses: list[float] = field(default_factory=list)
    epoch_losses: list[float] = field(default_factory=list)
    test_accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def norm_seconds(self):
        return sum(norm.seconds for norm in self.norms)


def new_run(norm, seed, dtype):
    """Three convolutions, each with a norm and a ReLU, and a linear layer. The seed fixes the initial weights."""
    rng = np.random.default_rng(seed)
    first, second, third = norm((8, 8, 32), dtype), norm((8, 8, 32), dtype), norm((4, 4, 64), dtype)
    layers = [
        Convolution(1, 32, rng=rng, dtype=dtype, first=True), first, ReLU(),
        Convolution(32, 32, rng=rng, dtype=dtype), second, ReLU(), AveragePool(),
        Convolution(32, 64, rng=rng, dtype=dtype), third, ReLU(),
        Linear(4 * 4 * 64, 10, rng=rng, dtype=dtype),
    ]  # fmt: skip
    return Run(Network(layers), [first, second, third])


def sgd_step(parameters, rate):
    """Gradient descent with momentum and weight decay."""
    for parameter in parameters:
        gradient = parameter.grad + WEIGHT_DECAY * parameter.value if parameter.decays else parameter.grad
        parameter.velocity *= MOMENTUM
        parameter.velocity -= rate * gradient
        parameter.value += parameter.velocity


def train(runs, digits, *, epochs, seed, advance):
    """Train the runs side by side on the same batches; `advance()` is called after every epoch of every run.

    The runs take turns batch by batch, so that whatever else the machine does meanwhile slows all of them alike.
    """
    shuffle = np.random.default_rng(seed)
    count = len(digits.train_labels)
    steps_per_epoch = count // BATCH
    step = 0
    for _ in range(epochs):
        order = shuffle.permutation(count)
        for start in range(0, steps_per_epoch * BATCH, BATCH):
            batch = order[start : start + BATCH]
            rate = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * step / (epochs * steps_per_epoch)))
            for run in runs:
                train_step(run, digits.train_images[batch], digits.train_labels[batch], rate)
            step += 1
        for run in runs:
            run.epoch_losses.append(float(np.mean(run.step_losses[-steps_per_epoch:])))
            run.test_accuracies.append(accuracy(run.network, digits.test_images, digits.test_labels))
            advance()


def train_step(run, images, labels, rate):
    start = perf_counter()
    loss, gradient = cross_entropy(run.network.forward(images, training=True), labels)
    run.network.backward(gradient)
    sgd_step(run.network.parameters, rate)
    run.seconds += perf_counter() - start
    run.step_losses.append(float(loss))


def predict(network, images):
    """Probability of each digit, in evaluation mode: batch norm uses its running statistics."""
    parts = [images[i : i + 256] for i in range(0, len(images), 256)]
    return np.concatenate([softmax(network.forward(part, training=False)) for part in parts])


def accuracy(network, images, labels):
    return float((predict(network, images).argmax(axis=1) == labels).mean())
