"""Data and calls that every test file shares: one `Case` is one norm in one layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

import _oracle
import normfast as nf
from _checks import F32, stat_dtype

EPS = {"rms_norm": 1e-6}  # the others: 1e-5
BACKWARD_NAMES = ("x", "weight", "bias")


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def data(shape, dtype=F32, seed=0, *, mean=0.7, std=1.3):
    """Smooth random numbers with a few spikes; never a grid, where sums would be exact by luck."""
    r = rng(seed)
    x = r.standard_normal(shape)
    x = np.where(r.random(shape) < 0.01, x * 9, x) * std + mean
    return x.astype(dtype)


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] | None = None
    channel_axis: int | None = None
    num_groups: int | None = None
    training: bool = True
    permutation: tuple[int, ...] | None = None  # memory order of x: axes from slowest to fastest

    def __str__(self):
        where = f"axis={self.axis}" if self.axis is not None else f"channel={self.channel_axis}"
        parts = [self.op, "x".join(map(str, self.shape)), where.replace(" ", "")]
        if self.num_groups:
            parts.append(f"groups={self.num_groups}")
        if not self.training:
            parts.append("eval")
        if self.permutation:
            parts.append("memory=" + "".join(map(str, self.permutation)))
        return "-".join(parts)

    def with_(self, **changes):
        return replace(self, **changes)

    @property
    def has_mean(self):
        return self.op != "rms_norm"

    has_bias = has_mean

    @property
    def names(self):
        return BACKWARD_NAMES if self.has_bias else BACKWARD_NAMES[:2]

    @property
    def eps(self):
        return EPS.get(self.op, 1e-5)

    @property
    def geometry(self):
        return _oracle.geometry(self.op, self.shape, self.axis, self.channel_axis, self.num_groups)

    @property
    def _axes(self):
        """The normalized axes of layer and RMS norm, in order."""
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return sorted(a % len(self.shape) for a in axes)

    @property
    def param_shape(self):
        if self.axis is None:
            return (self.shape[self.channel_axis],)
        return tuple(self.shape[a] for a in self._axes)

    @property
    def stat_shape(self):
        if self.axis is not None:
            return tuple(1 if a in self._axes else n for a, n in enumerate(self.shape))
        if self.op == "batch_norm":
            return self.param_shape
        return (self.shape[0], self.num_groups or self.shape[self.channel_axis])

    # ------------------------------------------------------------------ data

    def ordered(self, a):
        """The same values in the memory order of the case."""
        if self.permutation is None:
            return np.ascontiguousarray(a)
        return np.ascontiguousarray(a.transpose(self.permutation)).transpose(np.argsort(self.permutation))

    def x(self, dtype=F32, seed=0, **kw):
        return self.ordered(data(self.shape, dtype, seed, **kw))

    def dy(self, dtype=F32, seed=1):
        return self.ordered(data(self.shape, dtype, seed, mean=0.05, std=1.0))

    def weight(self, dtype=F32, seed=2):
        return data(self.param_shape, dtype, seed, mean=1.0, std=0.3)

    def bias(self, dtype=F32, seed=3):
        return data(self.param_shape, dtype, seed, mean=0.1, std=0.3) if self.has_bias else None

    def running(self, dtype=F32, seed=4):
        """Running mean and variance, near those of the data."""
        if self.op != "batch_norm":
            return None
        mean = data(self.param_shape, dtype, seed, mean=0.6, std=0.1)
        return mean, (rng(seed).random(self.param_shape) + 0.8).astype(dtype)

    # ----------------------------------------------------------------- calls

    def _where(self):
        if self.axis is not None:
            return {"axis": self.axis}
        return {"channel_axis": self.channel_axis}

    def forward(self, x, weight=None, bias=None, *, running=None, **kw):
        """`y`, or with return_stats=True always three results: y, mean (None for RMS norm), rstd."""
        function = getattr(nf, self.op)
        kw |= self._where()
        if self.op == "rms_norm":
            result = function(x, weight, **kw)
            return (result[0], None, result[1]) if kw.get("return_stats") else result
        if self.op == "group_norm":
            return function(x, self.num_groups, weight, bias, **kw)
        if self.op == "batch_norm":
            if running is None and not self.training:
                running = self.running()
            return function(x, *(running or (None, None)), weight, bias, training=self.training, **kw)
        return function(x, weight, bias, **kw)

    def backward(self, dy, x, mean, rstd, weight=None, **kw):
        function = getattr(nf, self.op + "_backward")
        kw |= self._where()
        if self.op == "rms_norm":
            return function(dy, x, rstd, weight, **kw)
        if self.op == "batch_norm":
            kw["training"] = self.training
        return function(dy, x, mean, rstd, weight, **kw)

    def exact_forward(self, x, weight=None, bias=None, *, eps=None, running=None):
        if self.op == "batch_norm" and not self.training:
            running = running or self.running()
        mean, var = running if running is not None and not self.training else (None, None)
        eps = self.eps if eps is None else eps
        return _oracle.forward(self.geometry, x, weight, bias, eps=eps, centred=self.has_mean, mean=mean, var=var)

    def exact_backward(self, dy, x, mean, rstd, weight=None):
        return _oracle.backward(
            self.geometry, dy, x, mean, rstd, weight, centred=self.has_mean, frozen=not self.training
        )

    def exact_stats(self, x, eps=None, dtype=None):
        """Mean and rstd as the library documents them, from the exact values: good input for backward."""
        want = self.exact_forward(x, eps=eps)
        dtype = stat_dtype(x.dtype) if dtype is None else dtype
        return (want.mean.astype(dtype) if self.has_mean else None), want.rstd.astype(dtype)


def layer(shape, axis=-1, **kw):
    return Case("layer_norm", shape, axis=axis, **kw)


def rms(shape, axis=-1, **kw):
    return Case("rms_norm", shape, axis=axis, **kw)


def group(shape, num_groups, channel_axis=1, **kw):
    return Case("group_norm", shape, num_groups=num_groups, channel_axis=channel_axis, **kw)


def instance(shape, channel_axis=1, **kw):
    return Case("instance_norm", shape, channel_axis=channel_axis, **kw)


def batch(shape, channel_axis=1, **kw):
    return Case("batch_norm", shape, channel_axis=channel_axis, **kw)


# Every norm in every kind of layout: rows, columns, permuted memory, tuples of axes. Odd sizes throughout.
LAYOUTS = [
    layer((37, 67)),
    layer((5, 7, 33), axis=(1, 2)),
    layer((5, 7, 33), axis=(-1, -2)),
    layer((3, 19, 6, 7), axis=1),
    layer((3, 19, 6, 7), axis=(0, 2)),
    layer((3, 5, 6, 7), axis=(1, 3)),
    layer((67, 37), axis=0),
    layer((9, 11, 13), axis=(0, 1, 2)),
    layer((5, 7, 33), axis=-1, permutation=(2, 1, 0)),
    layer((3, 19, 6, 7), axis=1, permutation=(0, 2, 3, 1)),
    rms((37, 67)),
    rms((5, 7, 33), axis=(1, 2)),
    rms((3, 19, 6, 7), axis=1),
    rms((3, 19, 6, 7), axis=(0, 2)),
    rms((67, 37), axis=0),
    rms((5, 7, 33), axis=-1, permutation=(1, 0, 2)),
    group((3, 12, 5, 7), 4),
    group((3, 12, 5, 7), 1),
    group((3, 12, 5, 7), 12),
    group((3, 5, 7, 12), 4, channel_axis=-1),
    group((3, 5, 12, 7), 3, channel_axis=2),
    group((3, 12, 5, 7), 4, permutation=(0, 2, 3, 1)),
    group((5, 36), 4),
    instance((3, 12, 5, 7)),
    instance((3, 5, 7, 12), channel_axis=-1),
    instance((3, 5, 12, 7), channel_axis=2),
    instance((3, 12, 5, 7), permutation=(0, 2, 3, 1)),
    instance((3, 5, 61)),
    batch((6, 11, 5, 7)),
    batch((6, 5, 7, 11), channel_axis=-1),
    batch((6, 5, 11, 7), channel_axis=2),
    batch((11, 6, 35), channel_axis=0),
    batch((6, 11, 5, 7), permutation=(0, 2, 3, 1)),
    batch((71, 37)),
    batch((6, 11, 35), training=False),
    batch((6, 35, 11), channel_axis=-1, training=False),
]
