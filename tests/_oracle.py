"""The exact results, in long double, built from nothing but an index of cells.

A geometry says which cells of x share a statistic and which share a parameter; everything else is two-dimensional.
No line is shared with the library or with `normfast.reference`: a wrong axis in one of them cannot hide in the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LD = np.longdouble


@dataclass(frozen=True, eq=False)
class Geometry:
    shape: tuple[int, ...]
    param_shape: tuple[int, ...]
    stat_shape: tuple[int, ...]
    cells: np.ndarray  # (reductions, cells of each): flat index into x
    params: np.ndarray  # the same shape: flat index of the parameter of that cell

    def rows(self, x):
        return exact(x).reshape(-1)[self.cells]

    def unrows(self, values):
        flat = np.empty(self.cells.size, values.dtype)
        flat[self.cells] = values
        return flat.reshape(self.shape)

    def spread(self, param, default):
        """Parameter of every cell, (reductions, cells)."""
        return LD(default) if param is None else exact(param).reshape(-1)[self.params]

    def sum_by_parameter(self, values):
        count = int(np.prod(self.param_shape, dtype=np.intp))
        order = np.argsort(self.params.reshape(-1), kind="stable")
        each = values.reshape(-1)[order].reshape(count, -1 if count else 0)
        return each.sum(axis=1).reshape(self.param_shape)


def exact(a):
    """Long double values of an array of any of the four dtypes."""
    a = np.asarray(a)
    return (a.astype(np.float64) if a.dtype != LD else a).astype(LD)


@lru_cache(maxsize=16)
def geometry(op, shape, axis=None, channel_axis=None, num_groups=None):
    ndim = len(shape)
    index = np.arange(int(np.prod(shape, dtype=np.intp))).reshape(shape)
    if op in ("layer_norm", "rms_norm"):
        axes = (axis,) if isinstance(axis, int) else axis
        axes = tuple(sorted(a % ndim for a in axes))
        kept = tuple(a for a in range(ndim) if a not in axes)
        param_shape = tuple(shape[a] for a in axes)
        width = int(np.prod(param_shape, dtype=np.intp))
        count = int(np.prod([shape[a] for a in kept], dtype=np.intp))
        cells = index.transpose(kept + axes).reshape(count, width)
        params = np.broadcast_to(np.arange(width), cells.shape)
        return Geometry(shape, param_shape, tuple(1 if a in axes else n for a, n in enumerate(shape)), cells, params)
    c = channel_axis % ndim
    channels = shape[c]
    along = np.arange(channels).reshape(tuple(channels if a == c else 1 for a in range(ndim)))
    channel = np.broadcast_to(along, shape)
    width = index.size
    if op == "batch_norm":
        width //= max(channels, 1)
        flat = (channels, width)
        return Geometry(
            shape,
            (channels,),
            (channels,),
            np.moveaxis(index, c, 0).reshape(flat),
            np.moveaxis(channel, c, 0).reshape(flat),
        )
    groups = channels if op == "instance_norm" else num_groups
    width //= max(shape[0] * groups, 1)
    flat = (shape[0] * groups, width)
    return Geometry(
        shape,
        (channels,),
        (shape[0], groups),
        np.moveaxis(index, c, 1).reshape(flat),
        np.moveaxis(channel, c, 1).reshape(flat),
    )


@dataclass(frozen=True, eq=False)
class Forward:
    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    rstd: np.ndarray
    scale: np.ndarray  # of every cell: the largest |(x - mean)*rstd*weight| + |bias| of its reduction


def forward(g, x, weight=None, bias=None, *, eps, centred=True, mean=None, var=None):
    """`mean` and `var` given: evaluation of batch norm. `centred=False`: RMS norm."""
    rows = g.rows(x)
    with np.errstate(all="ignore"):
        if mean is not None:
            mean, var = exact(mean).reshape(-1, 1), exact(var).reshape(-1, 1)
            d = rows - mean
        elif centred:
            # Shifted by a cell first: the differences are exact, so the mean costs no digits far from zero.
            pilot = rows[:, :1]
            d = rows - pilot
            shift = d.mean(axis=1, keepdims=True)
            d = d - shift
            rest = d.mean(axis=1, keepdims=True)
            d, mean = d - rest, pilot + (shift + rest)
            # A constant reduction has variance zero, not the rounding error of its mean.
            d[np.broadcast_to((rows == pilot).all(axis=1, keepdims=True), d.shape)] = 0
            var = (d * d).mean(axis=1, keepdims=True)
        else:
            d, mean = rows, np.zeros((len(rows), 1), LD)
            var = (d * d).mean(axis=1, keepdims=True)
        rstd = 1 / np.sqrt(var + LD(eps))
        xhat = np.where(d == 0, LD(0), d * rstd)
        scaled = xhat * g.spread(weight, 1)
        b = g.spread(bias, 0)
        scale = (np.abs(scaled) + np.abs(b)).max(axis=1, keepdims=True)
        y = scaled + b
    return Forward(
        g.unrows(y),
        mean.reshape(g.stat_shape),
        var.reshape(g.stat_shape),
        rstd.reshape(g.stat_shape),
        g.unrows(np.broadcast_to(scale, y.shape)),
    )


@dataclass(frozen=True, eq=False)
class Backward:
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    dx_terms: float  # norm of the terms whose sum the gradient is
    dweight_terms: float
    dbias_terms: float


def backward(g, dy, x, mean, rstd, weight=None, *, centred=True, frozen=False):
    rows, dy = g.rows(x), g.rows(dy)
    mean = LD(0) if mean is None else exact(mean).reshape(-1, 1)
    rstd = exact(rstd).reshape(-1, 1)
    with np.errstate(all="ignore"):
        gone = np.isinf(rstd)  # constant data at eps=0: the output does not depend on x
        rstd = np.where(gone, LD(0), rstd)
        xhat = (rows - mean) * rstd
        dxhat = dy * g.spread(weight, 1)
        first = dxhat.mean(axis=1, keepdims=True) if centred and not frozen else LD(0)
        second = xhat * (0 if frozen else (dxhat * xhat).mean(axis=1, keepdims=True))
        dx = rstd * (dxhat - first - second)
        terms = [rstd * dxhat, np.broadcast_to(rstd * first, dx.shape), rstd * second]
    return Backward(
        g.unrows(dx),
        g.sum_by_parameter(dy * xhat),
        g.sum_by_parameter(dy),
        float(np.sqrt(sum((t * t).sum() for t in terms))),
        float(np.sqrt(((dy * xhat) ** 2).sum())),
        float(np.sqrt((dy * dy).sum())),
    )
