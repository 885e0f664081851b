# SPDX-License-Identifier: BSD-3-Clause

"""The definition of every operation, in plain NumPy.

These functions have the signatures of the public ones and say what those compute. They are written to be read and to
be right, not to be fast: the tests compare the compiled functions with them. They check next to nothing, and their
results lie in C order.

**Normalizing** means to shift and scale a set of numbers so that their mean becomes 0 and their variance 1::

    mean = sum(x) / n        var = sum((x - mean)**2) / n        rstd = 1 / sqrt(var + eps)
    xhat = (x - mean) * rstd                                     y = xhat * weight + bias

The variance is the biased one, divided by ``n``. ``eps`` keeps ``rstd`` finite where all numbers are equal. ``weight``
and ``bias`` are learned; they let a network undo the normalization where that serves it. RMS norm leaves the mean out.

**The norms differ only in which cells of x are normalized together.** For images ``x[n, c, h, w]``:

============= ============================= ===================
norm          one mean and variance per     ``weight``, ``bias``
============= ============================= ===================
batch norm    ``c``                         per ``c``
instance norm ``n``, ``c``                  per ``c``
group norm    ``n``, group of channels      per ``c``
layer norm    all axes but ``axis``         per cell of ``axis``
============= ============================= ===================

**Backward** follows from the chain rule. ``x`` reaches ``y`` in three ways: directly, through ``mean``, and through
``rstd``. With ``g = dy * weight``, the gradient of the loss by ``xhat``, these are the three terms of ::

    dx = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n)      dweight = sum(dy * xhat)      dbias = sum(dy)

RMS norm has no mean and lacks the middle term. Where the statistics are constants, ``dx = rstd * g``.

**Numbers.** All is computed in float64 and rounded once to the dtype of the result. If ``x`` is ``np.longdouble``, all
is computed and returned in that; and so are the gradients of parameters whose ``weight`` is. To measure errors, hand
over wider copies of the data: the results are then not rounded to the dtype under test. float64 data whose squares
leave the range of float64 need ``np.longdouble`` as well.

Where ``rstd`` is infinite (``var + eps`` is 0) the data are constant: ``xhat`` is 0, and no gradient flows to ``x``.

>>> import numpy as np
>>> from normfast import reference
>>> reference.layer_norm(np.array([4.0, 6213.0, 347.0]), eps=0).round(4)
array([-0.7664,  1.4125, -0.6461])
"""

from math import prod

import numpy as np
from numpy.lib.array_utils import normalize_axis_index, normalize_axis_tuple

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]

# Infinity, NaN and overflow are results here, not accidents to warn of.
_quiet = np.errstate(all="ignore")


# ---- Dtypes ----------------------------------------------------------------------------------------------------------


def _result_dtype(a):
    """The dtype of a result for ``a``: its own in native byte order, float64 for integers and booleans."""
    dtype = np.asarray(a).dtype
    return np.dtype(np.float64) if dtype.kind in "biu" else dtype.newbyteorder("=")


def _stats_dtype(x):
    """float32 for 16-bit ``x``, float64 for float32 and float64."""
    dtype = _result_dtype(x)
    return np.dtype(np.float32) if dtype.itemsize == 2 else np.result_type(dtype, np.float64)


def _wide(a):
    """``a`` in the dtype that is computed in: float64, or longdouble where ``a`` is."""
    a = np.asarray(a)
    return a.astype(np.result_type(_result_dtype(a), np.float64))


# ---- Steps that the norms share --------------------------------------------------------------------------------------


def _sorted_axes(axis, x):
    """``axis`` as a tuple of axes from 0 up, in the order of ``x``."""
    return tuple(sorted(normalize_axis_tuple(axis, x.ndim)))


def _sum(a, axes):
    """The sum over ``axes``, which stay with length 1."""
    kept = tuple(i for i in range(a.ndim) if i not in axes)
    rows = a.transpose(kept + axes).reshape(prod(a.shape[i] for i in kept), prod(a.shape[i] for i in axes))
    # NumPy sums pairwise, which keeps rounding errors small, along contiguous cells only.
    total = np.add.reduce(np.ascontiguousarray(rows), axis=1)
    return total.reshape([1 if i in axes else length for i, length in enumerate(a.shape)])


def _mean(a, axes):
    """The mean over ``axes``, which stay with length 1."""
    n = prod(a.shape[i] for i in axes)
    if n == 0:
        raise ValueError("x must have at least one element in each reduction")
    return _sum(a, axes) / n


def _moments(x, axes):
    """Mean and variance over ``axes``, and ``x - mean``."""
    mean = _mean(x, axes)
    centred = x - mean
    # A rounded mean is not quite the mean. What it lacks, the mean of the differences, matters far from zero; and it
    # makes the differences of equal numbers exactly 0: they are a few units in the last place, whose sums are exact.
    rest = _mean(centred, axes)
    centred = centred - rest
    return mean + rest, _mean(centred**2, axes), centred


def _scaled(centred, rstd):
    """``xhat``: 0 where ``rstd`` is infinite, that is, where the data are constant."""
    return np.where(np.isinf(rstd), 0, centred * rstd)


def _input_gradient(g, xhat, rstd, axes):
    """The gradient by ``x`` of ``xhat = (x - mean) * rstd``, given the gradient ``g`` by ``xhat``."""
    dx = rstd * (g - _mean(g, axes) - xhat * _mean(g * xhat, axes))
    return np.where(np.isinf(rstd), 0, dx)


def _along(parameter, x, axes, default):
    """A weight or bias shaped to broadcast against ``x`` along ``axes``."""
    if parameter is None:
        return default
    return _wide(parameter).reshape([length if i in axes else 1 for i, length in enumerate(x.shape)])


def _forward_result(y, x, out, return_stats, *stats):
    """``y`` or ``(y, *stats)`` in the dtypes of the contract, ``y`` in ``out`` if there is one."""
    y = _stored(y, _result_dtype(x), out)
    return (y, *(s.astype(_stats_dtype(x)) for s in stats)) if return_stats else y


def _backward_result(x, weight, axes, needs, out, /, **cells):
    """The gradients that are needed, ``None`` for the others.

    ``cells`` holds by name the gradient by ``x`` and the contribution of every cell to the gradients by ``weight`` and
    ``bias``, which are summed here over all axes but ``axes``.
    """
    if needs is None:
        needs = ("x",) if weight is None else ("x", "weight", "bias")
    results = []
    for name, cell in cells.items():
        if name not in needs:
            results.append(None)
        elif name == "x":
            results.append(_stored(cell, _result_dtype(x), out))
        else:
            total = _sum(cell, tuple(i for i in range(cell.ndim) if i not in axes))
            dtype = _result_dtype(x if weight is None else weight)
            results.append(total.reshape([cell.shape[i] for i in axes]).astype(dtype))
    return tuple(results)


def _stored(result, dtype, out):
    """``result`` as a new array of ``dtype``, or written to ``out``."""
    if out is None:
        return result.astype(dtype, order="C")
    out[...] = result.astype(dtype)
    return out


# ---- Layer norm ------------------------------------------------------------------------------------------------------


@_quiet
def layer_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-5, out=None, return_stats=False):
    """Normalize over ``axis``, the cells of each sample. Weight and bias: one per cell."""
    cells = _wide(x)
    axes = _sorted_axes(axis, cells)
    mean, var, centred = _moments(cells, axes)
    rstd = 1 / np.sqrt(var + eps)
    y = _scaled(centred, rstd) * _along(weight, cells, axes, 1.0) + _along(bias, cells, axes, 0.0)
    return _forward_result(y, x, out, return_stats, mean, rstd)


@_quiet
def layer_norm_backward(dy, x, mean, rstd, weight=None, *, axis=-1, needs=None, out=None):
    """Gradients of layer norm by ``x``, ``weight`` and ``bias``."""
    dy, cells, mean, rstd = _wide(dy), _wide(x), _wide(mean), _wide(rstd)
    axes = _sorted_axes(axis, cells)
    xhat = _scaled(cells - mean, rstd)
    dx = _input_gradient(dy * _along(weight, cells, axes, 1.0), xhat, rstd, axes)
    return _backward_result(x, weight, axes, needs, out, x=dx, weight=dy * xhat, bias=dy)


# ---- RMS norm: layer norm without the mean ---------------------------------------------------------------------------


@_quiet
def rms_norm(x, weight=None, *, axis=-1, eps=1e-6, out=None, return_stats=False):
    """Divide by the root of the mean square over ``axis``. Weight: one per cell."""
    cells = _wide(x)
    axes = _sorted_axes(axis, cells)
    rstd = 1 / np.sqrt(_mean(cells**2, axes) + eps)
    y = _scaled(cells, rstd) * _along(weight, cells, axes, 1.0)
    return _forward_result(y, x, out, return_stats, rstd)


@_quiet
def rms_norm_backward(dy, x, rstd, weight=None, *, axis=-1, needs=None, out=None):
    """Gradients of RMS norm by ``x`` and ``weight``."""
    dy, cells, rstd = _wide(dy), _wide(x), _wide(rstd)
    axes = _sorted_axes(axis, cells)
    xhat = _scaled(cells, rstd)
    g = dy * _along(weight, cells, axes, 1.0)
    # x reaches y directly and through rstd; there is no mean.
    dx = np.where(np.isinf(rstd), 0, rstd * (g - xhat * _mean(g * xhat, axes)))
    return _backward_result(x, weight, axes, needs, out, x=dx, weight=dy * xhat)


# ---- Group norm, and instance norm, which is group norm with groups of one channel -----------------------------------


def _grouped(x, num_groups, channel_axis):
    """``x`` as ``(samples, groups, cells of the group)``."""
    x = np.moveaxis(x, channel_axis, 1)
    samples, channels, *rest = x.shape
    per_group = channels // num_groups if num_groups else 1
    return x.reshape(samples, num_groups, per_group * prod(rest))


def _ungrouped(groups, x, channel_axis):
    """The cells of ``groups`` back where they lie in ``x``."""
    return np.moveaxis(groups.reshape(np.moveaxis(x, channel_axis, 1).shape), 1, channel_axis)


@_quiet
def group_norm(x, num_groups, weight=None, bias=None, *, channel_axis=1, eps=1e-5, out=None, return_stats=False):
    """Normalize each group of consecutive channels of each sample. Weight and bias: one per channel."""
    cells = _wide(x)
    channel = normalize_axis_index(channel_axis, cells.ndim)
    mean, var, centred = _moments(_grouped(cells, num_groups, channel), (2,))
    rstd = 1 / np.sqrt(var + eps)
    xhat = _ungrouped(_scaled(centred, rstd), cells, channel)
    y = xhat * _along(weight, cells, (channel,), 1.0) + _along(bias, cells, (channel,), 0.0)
    return _forward_result(y, x, out, return_stats, mean[..., 0], rstd[..., 0])


@_quiet
def group_norm_backward(dy, x, mean, rstd, weight=None, *, channel_axis=1, needs=None, out=None):
    """Gradients of group norm by ``x``, ``weight`` and ``bias``; ``mean.shape[1]`` is the number of groups."""
    dy, cells, mean, rstd = _wide(dy), _wide(x), _wide(mean)[..., None], _wide(rstd)[..., None]
    channel, num_groups = normalize_axis_index(channel_axis, cells.ndim), mean.shape[1]
    xhat = _scaled(_grouped(cells, num_groups, channel) - mean, rstd)
    g = _grouped(dy * _along(weight, cells, (channel,), 1.0), num_groups, channel)
    dx = _ungrouped(_input_gradient(g, xhat, rstd, (2,)), cells, channel)
    xhat = _ungrouped(xhat, cells, channel)
    return _backward_result(x, weight, (channel,), needs, out, x=dx, weight=dy * xhat, bias=dy)


def instance_norm(x, weight=None, bias=None, *, channel_axis=1, eps=1e-5, out=None, return_stats=False):
    """Normalize each channel of each sample. Weight and bias: one per channel."""
    channels = np.shape(x)[channel_axis]
    return group_norm(x, channels, weight, bias, channel_axis=channel_axis, eps=eps, out=out, return_stats=return_stats)


def instance_norm_backward(dy, x, mean, rstd, weight=None, *, channel_axis=1, needs=None, out=None):
    """Gradients of instance norm by ``x``, ``weight`` and ``bias``."""
    return group_norm_backward(dy, x, mean, rstd, weight, channel_axis=channel_axis, needs=needs, out=out)


# ---- Batch norm ------------------------------------------------------------------------------------------------------


@_quiet
def batch_norm(
    x,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    *,
    training=False,
    momentum=0.1,
    decay=None,
    running_ddof=1,
    eps=1e-5,
    channel_axis=1,
    out=None,
    return_stats=False,
):
    """Normalize each channel over all samples, with running statistics in evaluation. Weight and bias: per channel."""
    cells = _wide(x)
    channel = normalize_axis_index(channel_axis, cells.ndim)
    axes = tuple(i for i in range(cells.ndim) if i != channel)
    if training:
        n = prod(cells.shape[i] for i in axes)
        if n == 1:
            raise ValueError("batch_norm: Expected more than 1 value per channel when training")
        mean, var, centred = _moments(cells, axes)
        if running_mean is not None and running_var is not None:
            keep, take = (1 - momentum, momentum) if decay is None else (decay, 1 - decay)
            unbiased = var * n / (n - running_ddof)
            running_mean[...] = keep * _wide(running_mean) + take * mean.ravel()
            running_var[...] = keep * _wide(running_var) + take * unbiased.ravel()
    else:
        mean, var = (_along(running, cells, (channel,), np.nan) for running in (running_mean, running_var))
        centred = cells - mean
    rstd = 1 / np.sqrt(var + eps)
    y = _scaled(centred, rstd) * _along(weight, cells, (channel,), 1.0) + _along(bias, cells, (channel,), 0.0)
    return _forward_result(y, x, out, return_stats, mean.ravel(), rstd.ravel())


@_quiet
def batch_norm_backward(dy, x, mean, rstd, weight=None, *, training=True, channel_axis=1, needs=None, out=None):
    """Gradients of batch norm by ``x``, ``weight`` and ``bias``; statistics are constants if not ``training``."""
    dy, cells = _wide(dy), _wide(x)
    channel = normalize_axis_index(channel_axis, cells.ndim)
    axes = tuple(i for i in range(cells.ndim) if i != channel)
    mean, rstd = _along(mean, cells, (channel,), np.nan), _along(rstd, cells, (channel,), np.nan)
    xhat = _scaled(cells - mean, rstd)
    g = dy * _along(weight, cells, (channel,), 1.0)
    dx = _input_gradient(g, xhat, rstd, axes) if training else _scaled(g, rstd)
    return _backward_result(x, weight, (channel,), needs, out, x=dx, weight=dy * xhat, bias=dy)
