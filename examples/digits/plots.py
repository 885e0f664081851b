"""Pictures of a finished training: learning curves, and the digits that the networks get wrong."""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")  # draw into files; no screen is needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from .train import predict

# A palette that stays apart for colour-blind readers and in grey.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
INK, MUTED, PALE = "#222222", "#666666", "#C8C8C8"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "savefig.dpi": 200,
}


@mpl.rc_context(STYLE)
def learning_curves(runs, path):
    """Training loss, test error and time in the norms, one colour per norm."""
    figure, (loss, error, time) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=[1, 1, 0.95])
    for (name, (ours, plain)), colour in zip(runs.items(), COLOURS, strict=True):
        epochs = np.arange(1, len(ours.epoch_losses) + 1)
        loss.plot(epochs, ours.epoch_losses, color=colour, linewidth=1.6, label=name)
        loss.plot(epochs, plain.epoch_losses, "o", color=colour, markersize=4.5, fillstyle="none", markeredgewidth=0.9)
        error.plot(epochs, 1 - np.array(ours.test_accuracies), color=colour, linewidth=1.6)
    loss.plot([], [], "o", color=MUTED, markersize=4.5, fillstyle="none", label="the same on NumPy norms")
    loss.set(title="Training loss", xlabel="epoch", yscale="log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.legend(frameon=False, fontsize=8)
    error.set(title="Error on the test digits", xlabel="epoch", yscale="log")
    error.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    error.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    error.yaxis.set_minor_formatter(NullFormatter())
    for axes in (loss, error):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=PALE, linewidth=0.5)
    norm_times(time, runs)
    figure.savefig(path)
    plt.close(figure)
    return path


def norm_times(axes, runs):
    """Paired bars: seconds in the norms through normfast, and below them in plain NumPy."""
    rows = np.arange(len(runs))[::-1]
    for row, (ours, plain), colour in zip(rows, runs.values(), COLOURS, strict=True):
        first = row == rows[0]
        bar(axes, row + 0.19, ours.norm_seconds, colour, INK, " normfast" if first else "")
        bar(axes, row - 0.19, plain.norm_seconds, PALE, MUTED, " NumPy" if first else "")
    axes.set(title="Time in the norms while training", xlabel="seconds", yticks=rows, yticklabels=list(runs))
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 1.3 * max(run.norm_seconds for pair in runs.values() for run in pair))


def bar(axes, row, seconds, colour, ink, suffix):
    axes.barh(row, seconds, 0.36, color=colour)
    place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(f"{seconds:.2f} s{suffix}", (seconds, row), color=ink, fontsize=8, **place)


@mpl.rc_context(STYLE)
def misclassified(runs, digits, path, count=10):
    """The test digits that fool most networks, with what they are and what the networks read."""
    guesses = np.array([predict(run.network, digits.test_images).argmax(axis=1) for run in runs.values()])
    fooled = (guesses != digits.test_labels).sum(axis=0)
    worst = np.argsort(-fooled, kind="stable")[:count]
    worst = worst[fooled[worst] > 0]
    figure, axes = plt.subplots(2, count // 2, figsize=(7.2, 3.9), layout="constrained")
    for panel in axes.flat:
        panel.set_axis_off()  # panels stay empty where the networks make fewer mistakes
    for panel, index in zip(axes.flat, worst, strict=False):
        wrong = guesses[guesses[:, index] != digits.test_labels[index], index]
        panel.imshow(digits.test_images[index, :, :, 0], cmap="gray_r", vmin=0, vmax=1)
        panel.add_patch(plt.Rectangle((-0.5, -0.5), 8, 8, fill=False, edgecolor=PALE, linewidth=0.8))
        panel.set_title(f"{digits.test_labels[index]}, read as {np.bincount(wrong).argmax()}", loc="center")
        note = f"by {fooled[index]} of {len(runs)} networks"
        panel.text(0.5, -0.05, note, transform=panel.transAxes, ha="center", va="top", fontsize=8, color=MUTED)
    figure.savefig(path)
    plt.close(figure)
    return path
