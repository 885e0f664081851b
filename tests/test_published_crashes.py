"""The crashes that others have published of their norms, as calls of normfast: refused helpfully, or right.

All of them ended a process or corrupted its memory: an operator took its geometry from one argument and read or wrote
another without a look at its size. They run in one child process, which says before each call what comes; after each it
computes the same few results as at the start. The arguments are those of the reports.
"""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

import _child
import normfast as nf
from _checks import BF16, F32, F64, assert_same_bits

NAN, BIG = float("nan"), -7.4786e240


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def refused(function, error, message, *arguments, **named):
    """`function` raises exactly this error, with this text."""

    def call():
        try:
            getattr(nf, function)(*arguments, **named)
        except Exception as caught:
            raised = caught
        else:
            raise AssertionError("was not refused")
        assert type(raised) is error, repr(raised)
        assert str(raised) == f"{function}: {message}", str(raised)

    return call


def spoiled():
    """Every array beside x one cell too short, which is what all reports of this kind come to."""
    x, c, t = ones(4, 6, 5), zeros(6), {"training": True}
    stats = {"layer": (4, 6, 1), "rms": (4, 6, 1), "group": (4, 3), "instance": (4, 6), "batch": (6,)}
    for op, stat in stats.items():
        axes = op in ("layer", "rms")
        first = {"group": {"num_groups": 3}, "batch": t}.get(op, {})
        width, match = (5, "the normalised axes of x") if axes else (6, "x axis 1")
        for name in ("weight",) if op == "rms" else ("weight", "bias"):
            text = f"{name} must have shape ({width},) to match {match}, got ({width - 1},)"
            yield refused(f"{op}_norm", ValueError, text, x, **first, **{name: ones(width - 1)})
        good = {"dy": x, "x": x, "rstd": ones(*stat, dtype=F64)} | ({} if op == "rms" else {"mean": zeros(*stat)})
        text = f"weight must have shape ({width},) to match {match}, got ({width - 1},)"
        yield refused(f"{op}_norm_backward", ValueError, text, **good | {"weight": ones(width - 1)})
        short = (3, *stat[1:]) if len(stat) > 1 else (5,)
        text = f"rstd must have shape {stat}, got {short}"
        yield refused(f"{op}_norm_backward", ValueError, text, **good | {"rstd": ones(*short)})
        text = "dy must have the shape of x, (4, 6, 5), got (4, 6, 4)"
        yield refused(f"{op}_norm_backward", ValueError, text, **good | {"dy": ones(4, 6, 4)})
    for i, name in enumerate(("running_mean", "running_var")):
        text = f"{name} must have shape (6,) to match x axis 1, got (5,)"
        pair = [c, ones(6)]
        pair[i] = ones(5)
        yield refused("batch_norm", ValueError, text, x, *pair)
        yield refused("batch_norm", ValueError, text, x, *pair, **t)


MISSING = (
    "running_mean and running_var must be given when training=False, got None; "
    "pass training=True to use the batch's own statistics"
)


def mixed_dtypes():
    """Each running array may have a dtype of its own here."""
    mean, var = zeros(1, dtype=F64), ones(2)[1:]
    y = nf.batch_norm(ones(2, 1, dtype=BF16), mean, var, training=True)
    assert_same_bits(y, zeros(2, 1, dtype=BF16))
    assert mean == 0.1
    assert var == F32.type(0.9)


def huge_and_nan():
    """NaN stays in its channels; numbers whose squares leave float64 do no harm to the others."""
    x = np.full((3, 14), BIG)
    x[0, :7] = x[1, [2, 3, 9, 10, 11]] = x[2, 1:6] = NAN
    x[2, 9:13] = 2.6462e-260
    x[:, 13] = (1, 2, 6)
    mean, var = np.full(14, BIG), ones(14, dtype=F64)
    y = nf.batch_norm(x, mean, var, training=True)
    assert_same_bits(y[:, 13:], nf.batch_norm(x[:, 13:], training=True))
    assert np.isnan(y[:, np.isnan(x).any(axis=0)]).all()
    assert np.isnan(mean[np.isnan(x).any(axis=0)]).all()
    assert mean[7] == BIG
    assert not np.isnan(mean[13])
    return y


def nothing_to_normalise(shape, channel_axis, dtype, result):
    """No samples at all give an empty result: legal, in evaluation."""

    def call():
        channels = shape[channel_axis]
        y = nf.batch_norm(zeros(*shape, dtype=dtype), zeros(channels), ones(channels), channel_axis=channel_axis)
        assert_same_bits(y, zeros(*shape, dtype=result))

    return call


X85217 = ones(5, 5, dtype=F64)
X141203 = zeros(8, 3, 7, 3, 7)
NHWC = ones(2, 2, 2, 3)
BYTE = np.ones((1, 1, 1, 1), np.uint8)
EMPTY = zeros(4, 2, 0, 3)

# Number of the report: (what was passed there, the calls that this comes to here).
PUBLISHED = {
    "pytorch-195547": ("all norms: another argument shorter than the input says", [*spoiled()]),
    "pytorch-194014": (
        "batch norm in evaluation, without running statistics",
        [refused("batch_norm", ValueError, MISSING, np.full((9, 2, 8, 8), 1.11e15, F32), training=False)],
    ),
    "pytorch-169208": (
        "batch norm in training, running_var of no elements for 8 channels",
        [
            refused(
                "batch_norm", ValueError, "running_var must have shape (8,) to match x axis 1, got (0,)",
                ones(10, 8), zeros(8), ones(0), ones(8), zeros(8), training=True,
            ),
        ],
    ),
    "pytorch-194798": (
        "update of running statistics of one element for 4 channels",
        [
            refused(
                "batch_norm", ValueError, "running_mean must have shape (4,) to match x axis 1, got (1,)",
                np.arange(8, dtype=F32).reshape(2, 4, 1, 1), zeros(1), ones(1), training=True, momentum=0.1,
            ),
        ],
    ),
    "pytorch-85217": (
        "batch norm: a weight with ten axes, some of length 0, and empty running statistics",
        [
            refused(
                "batch_norm", ValueError,
                "weight must have shape (5,) to match x axis 1, got (14, 9, 12, 0, 6, 0, 15, 0, 0, 0)",
                X85217, zeros(0, dtype=F64), zeros(0, dtype=F64), ones(14, 9, 12, 0, 6, 0, 15, 0, 0, 0, dtype=F64),
                ones(5, dtype=F64), training=True, momentum=0, eps=0,
            ),
            refused(
                "batch_norm", ValueError, "running_mean must have shape (5,) to match x axis 1, got (0,)",
                X85217, zeros(0, dtype=F64), zeros(0, dtype=F64), training=True, momentum=0, eps=0,
            ),
        ],
    ),
    "pytorch-141203": (
        "batch norm in evaluation, without running statistics, momentum beyond 1, enormous eps",
        [
            refused(
                "batch_norm", ValueError, "momentum must lie in [0, 1], got 2.71828",
                X141203, training=False, momentum=2.71828, eps=9.87654e9,
            ),
            refused("batch_norm", ValueError, MISSING, X141203, training=False, eps=9.87654e9),
        ],
    ),
    "pytorch-153967": (
        "update of running statistics with NaN and -7e240",
        [
            huge_and_nan,
            refused(
                "batch_norm", ValueError, "running_mean must have shape (14,) to match x axis 1, got (13,)",
                np.full((3, 14), BIG), zeros(13, dtype=F64), ones(14, dtype=F64), training=True,
            ),
        ],
    ),
    "pytorch-193698": ("running_mean float64, running_var float32 at an odd address, x bfloat16", [mixed_dtypes]),
    "pytorch-188958": (
        "batch norm backward: dy and rstd of no elements, x of four",
        [
            refused(
                "batch_norm_backward", ValueError, "dy must have the shape of x, (2, 2), got (0, 128)",
                ones(0, 128, dtype=F64), np.full((2, 2), NAN), zeros(2, dtype=F64), ones(0, 16, 16, 3, dtype=F64),
            ),
            refused(
                "batch_norm_backward", ValueError, "rstd must have shape (2,), got (0, 16, 16, 3)",
                ones(2, 2, dtype=F64), np.full((2, 2), NAN), zeros(2, dtype=F64), ones(0, 16, 16, 3, dtype=F64),
            ),
        ],
    ),
    "pytorch-194806": (
        "group norm of a vector",
        [
            refused(
                "group_norm", ValueError, "x must have at least 2 dimensions (samples, channels, ...), got shape (1,)",
                ones(1), 1, ones(1),
            ),
        ],
    ),
    "pytorch-73188": (
        "group norm with 0 groups, weight and bias of the shape of x",
        [
            refused(
                "group_norm", ValueError, "num_groups must be at least 1, got 0",
                ones(4, 6, 5), 0, ones(4, 6, 5), ones(4, 6, 5), eps=0,
            ),
        ],
    ),
    "pytorch-50090": (
        "layer norm told that five numbers are 213 rows; a weight of one element",
        [
            refused(
                "layer_norm", ValueError, "weight must have shape (5,) to match the normalised axes of x, got (1,)",
                np.arange(1, 6, dtype=F32), ones(1), np.arange(1, 6, dtype=F32), eps=5.280893892284248,
            ),
        ],
    ),
    "CVE-2021-29583": (
        "batch norm, channels last: scale, offset, mean or variance of other lengths than the channels; empty tensors",
        [
            refused(
                "batch_norm", ValueError, f"{name} must have shape (3,) to match x axis 3, got ({n},)",
                NHWC, channel_axis=-1, **{"running_mean": zeros(3), "running_var": ones(3)} | {name: ones(n)},
            )
            for name in ("weight", "bias", "running_mean", "running_var")
            for n in (0, 1, 2, 4)
        ]
        + [
            nothing_to_normalise((0, 2, 2, 3), -1, F32, F32),
            refused(
                "batch_norm", ValueError, "x must have values in every channel when training, got shape (0, 2, 2, 3)",
                zeros(0, 2, 2, 3), training=True, channel_axis=-1,
            ),
        ],
    ),
    "CVE-2021-41223": (
        "batch norm backward: dy of nine elements, x of two; mean of two and variance of three for one channel",
        [
            refused(
                "batch_norm_backward", ValueError, "dy must have the shape of x, (1, 1, 1, 2), got (1, 1, 3, 3)",
                ones(1, 1, 3, 3), ones(1, 1, 1, 2), ones(2), ones(3), ones(2),
            ),
            refused(
                "batch_norm_backward", ValueError, "mean must have shape (1,), got (2,)",
                ones(1, 1, 1, 2), ones(1, 1, 1, 2), ones(2), ones(3), ones(2),
            ),
            refused(
                "batch_norm_backward", ValueError, "rstd must have shape (1,), got (3,)",
                ones(1, 1, 1, 2), ones(1, 1, 1, 2), ones(1), ones(3), ones(2),
            ),
        ],
    ),
    "CVE-2021-29547": (
        "batch norm of one byte whose ranges are empty: nothing of the kind exists here but empty or whole statistics",
        [
            refused(
                "batch_norm", ValueError, "running_mean must have shape (1,) to match x axis 1, got (0,)",
                BYTE, zeros(0), zeros(0), eps=0.1,
            ),
            refused(
                "batch_norm", TypeError,
                "running_mean must have the dtype of x (float64), float32 or float64, got uint8",
                BYTE, BYTE[0, 0, 0], BYTE[0, 0, 0], eps=0.1,
            ),
        ],
    ),
    # Neighbours of these, found beside them.
    "CVE-2021-29548": (
        "batch norm of nothing at all: shape (0, 0, 0, 0)",
        [
            nothing_to_normalise((0, 0, 0, 0), -1, np.dtype(np.uint8), F64),
            refused(
                "batch_norm", ValueError, "x must have values in every channel when training, got shape (0, 0, 0, 0)",
                zeros(0, 0, 0, 0), training=True,
            ),
        ],
    ),
    "pytorch-193097": (
        "batch norm in evaluation: transposed x, running statistics of one element for 3 channels",
        [
            refused(
                "batch_norm", ValueError, "running_mean must have shape (3,) to match x axis 1, got (1,)",
                ones(2, 3, 2, 4).transpose(0, 1, 3, 2), zeros(1), ones(1), ones(3),
            ),
        ],
    ),
    "pytorch-189831": (
        "batch norm backward: x without elements, but channels; dy and rstd empty",
        [
            refused(
                "batch_norm_backward", ValueError, "dy must have the shape of x, (4, 2, 0, 3), got (0,)",
                zeros(0), EMPTY, np.full(2, 1e25), zeros(0), np.full(2, NAN, F32),
            ),
            refused(
                "batch_norm_backward", ValueError, "rstd must have shape (2,), got (0,)",
                EMPTY, EMPTY, np.full(2, 1e25), zeros(0), np.full(2, NAN, F32),
            ),
        ],
    ),
    "pytorch-120803": (
        "update of running statistics from an input of shape (0, 0)",
        [
            refused(
                "batch_norm", ValueError, "running_mean must have shape (0,) to match x axis 1, got (1,)",
                zeros(0, 0), ones(1), ones(1), training=True, momentum=0.0,
            ),
        ],
    ),
    "pytorch-73194": (
        "group norm of ten axes with 0 groups and a weight of twenty",
        [
            refused(
                "group_norm", ValueError, "num_groups must be at least 1, got 0",
                np.full((1,) * 10, -1.5e300), 0, np.full((1,) * 20, 1.5e300), np.full((1,) * 10, 3.5e35), eps=0,
            ),
        ],
    ),
    "pytorch-77897": (
        "group norm of integers with 0 groups",
        [
            refused(
                "group_norm", ValueError, "num_groups must be at least 1, got 0",
                np.ones((1,) * 10, int), 0, np.ones((1,) * 10, int), np.ones((1,) * 10, int), eps=0,
            ),
        ],
    ),
}  # fmt: skip


def sample():
    """A few results whose bits must stay the same whatever was called in between."""
    x = np.linspace(-1, 2, 96, dtype=F32).reshape(4, 6, 4) ** 3
    y, mean, rstd = nf.group_norm(x, 3, return_stats=True)
    running = zeros(6), ones(6)
    return (
        *(y, mean, rstd),
        *nf.group_norm_backward(x, x, mean, rstd, ones(6)),
        *(nf.batch_norm(x, *running, training=True), *running),
        *(nf.layer_norm(x, axis=1), nf.rms_norm(x.astype(BF16))),
    )


def replay():
    """In the child: prints a line before each report's calls, and one with what came of them."""
    right = sample()
    for number, (_, calls) in PUBLISHED.items():
        print(json.dumps([number, None]), flush=True)
        outcome = "as it should"
        for i, call in enumerate(calls):
            try:
                call()
                assert_same_bits(sample(), right)
            except AssertionError as error:
                outcome = f"call {i}: {error}"
                break
        print(json.dumps([number, outcome]), flush=True)


def replayed(code):
    """What the child says of every report; the exit status and the standard error under None."""
    done = _child.spawn(f"import test_published_crashes as t\n{code}\nt.replay()")
    lines = dict(json.loads(line) for line in done.stdout.splitlines())
    return lines | {None: (done.returncode, done.stderr)}


@pytest.fixture(scope="module")
def outcomes():
    return replayed("")


@pytest.mark.parametrize("number", PUBLISHED)
def test_published(number, outcomes):
    """Refused with the text that says what is expected and what came, or right; the library goes on working."""
    assert PUBLISHED[number][1]
    assert outcomes.get(number, "was never reached") == "as it should", outcomes[None]


def test_what_is_noticed():
    """Negative control: calls that are accepted, refused in other words, do damage, or end the process."""
    code = """
import os
text = "eps must be finite and not negative, got -1"
t.PUBLISHED = {
    "accepted": ("", [t.refused("rms_norm", ValueError, text, t.ones(3))]),
    "other error": ("", [t.refused("rms_norm", TypeError, text, t.ones(3), eps=-1)]),
    "other text": ("", [t.refused("rms_norm", ValueError, "eps is bad", t.ones(3), eps=-1)]),
    "damage": ("", [lambda: None, lambda: setattr(t.nf, "rms_norm", lambda x: x)]),
    "crash": ("", [os.abort]),
    "after it": ("", [lambda: None]),
}
"""
    outcomes = replayed(code)
    eps = "eps must be finite and not negative, got -1"
    assert outcomes.pop(None)[0] == -signal.SIGABRT
    assert outcomes.pop("damage").startswith("call 1: result 10: ")
    assert outcomes == {
        "accepted": "call 0: was not refused",
        "other error": f"call 0: ValueError('rms_norm: {eps}')",
        "other text": f"call 0: rms_norm: {eps}",
        "crash": None,
    }
