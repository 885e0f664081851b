# SPDX-License-Identifier: BSD-3-Clause

"""Batch norm, forward and backward."""

from __future__ import annotations

from typing import Literal, overload

from . import _core
from ._typing import Array, ArrayLike, Gradient, Needs

__all__ = ["batch_norm", "batch_norm_backward"]


@overload
def batch_norm(
    x: ArrayLike,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    decay: float | None = None,
    running_ddof: int = 1,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: Array | None = None,
    return_stats: Literal[False] = False,
) -> Array: ...
@overload
def batch_norm(
    x: ArrayLike,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    decay: float | None = None,
    running_ddof: int = 1,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: Array | None = None,
    return_stats: Literal[True],
) -> tuple[Array, Array, Array]: ...
@overload
def batch_norm(
    x: ArrayLike,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    decay: float | None = None,
    running_ddof: int = 1,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: Array | None = None,
    return_stats: bool,
) -> Array | tuple[Array, Array, Array]: ...
def batch_norm(
    x: ArrayLike,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    decay: float | None = None,
    running_ddof: int = 1,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: Array | None = None,
    return_stats: bool = False,
) -> Array | tuple[Array, Array, Array]:
    """Normalize each channel over all samples.

    With ``training=True`` each channel, with its cells of all samples, is shifted to mean 0 and scaled to variance 1,
    and the running statistics, if given, take in the mean and variance of this batch. With ``training=False`` the
    running statistics stand in for those of the batch. Then each channel is multiplied by its `weight` and shifted by
    its `bias`.

    Parameters
    ----------
    x : array_like
        float16, bfloat16 (``ml_dtypes``), float32 or float64, with any strides and byte order; at least two axes.
        Integers and booleans are computed as float64.
    running_mean, running_var : ndarray, optional
        Running statistics of each channel, of shape ``(C,)`` and dtype float32, float64 or that of `x`; both or
        neither. Updated in place with ``training=True``, read and required with ``training=False``.
    weight, bias : array_like, optional
        Factor and summand of each channel, of shape ``(C,)``. The dtype is that of `x`, float32 or float64. Either may
        be given without the other.
    training : bool, optional
        Whether to normalize with the statistics of the batch. Default: False.
    momentum : float, optional
        Weight of the *new* value in the running statistics, 0 to 1, as in PyTorch. Default: 0.1.
    decay : float, optional
        Weight of the *old* value in the running statistics, 0 to 1, as in Keras, Flax and ONNX, instead of `momentum`.
    running_ddof : {1, 0}, optional
        The variance that enters `running_var` is divided by ``n - running_ddof``: 1 as in PyTorch, 0 as in Keras,
        Flax and ONNX. Default: 1.
    eps : float, optional
        Added to the variance. Finite, 0 or more. Default: 1e-5.
    channel_axis : int, optional
        The axis of the channels; -1 for channels-last arrays. Default: 1.
    out : ndarray, optional
        Array for the result, of its shape and dtype and with any strides. It may be `x` itself; it may not overlap the
        other arrays, or `x` in any other way.
    return_stats : bool, optional
        Whether to return the mean and ``rstd`` too, which `batch_norm_backward` needs. Default: False.

    Returns
    -------
    y : ndarray
        The normalized array, `out` if given. It has the shape and dtype of `x` (float64 if `x` holds integers or
        booleans) in native byte order, and the memory order of `x` where that is a permuted contiguous array, else C
        order.
    mean, rstd : ndarray
        Only with ``return_stats=True``. The mean and ``1 / sqrt(var + eps)`` of each channel, of the batch or, with
        ``training=False``, of the running statistics. Of shape ``(C,)``; float32 for 16-bit `x`, else float64.

    Raises
    ------
    TypeError
        If `x` is complex, object or string, if the dtype of `weight`, `bias`, `running_mean` or `running_var` is none
        of the above, if a running statistic to be updated is not an array, if `out` is not an array of the dtype of the
        result, or if another argument has the wrong type.
    ValueError
        If `x` has fewer than two axes, if there are fewer than two values per channel in training, if only one running
        statistic is given, or none with ``training=False``, if a running statistic to be updated is read-only, if
        `decay` is given together with a `momentum` other than the default, if `momentum` or `decay` is not in [0, 1],
        if `running_ddof` is neither 0 nor 1, if `weight`, `bias`, a running statistic or `out` has the wrong shape, if
        `eps` is negative or not finite, or if `out` is read-only or overlaps itself or another array.
    numpy.exceptions.AxisError
        If `channel_axis` is out of range.

    See Also
    --------
    batch_norm_backward : The gradients.
    instance_norm : Each channel of each sample by itself.

    Notes
    -----
    With the mean and the biased variance of a channel [1]_::

        y = (x - mean) / sqrt(var + eps) * weight + bias

    In training, with ``n`` values per channel::

        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var = (1 - momentum) * running_var + momentum * var * n / (n - running_ddof)

    With `decay`, ``momentum`` is ``1 - decay``.

    Equal cells give exactly `bias` (0 without one), with ``eps=0`` too; ``rstd`` is then infinite.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
       Covariate Shift", ICML 2015, arXiv:1502.03167.

    Examples
    --------
    Four samples of two channels, in training:

    >>> import numpy as np
    >>> import normfast as nf
    >>> x = np.array([[1, -2], [2, 0], [3, 2], [6, 0]], dtype=np.float32)
    >>> running_mean, running_var = np.zeros(2), np.ones(2)
    >>> nf.batch_norm(x, running_mean, running_var, training=True).round(3)
    array([[-1.069, -1.414],
           [-0.535,  0.   ],
           [ 0.   ,  1.414],
           [ 1.604,  0.   ]], dtype=float32)

    The running statistics have taken a tenth of those of the batch, means 3 and 0, unbiased variances 14/3 and 8/3:

    >>> running_mean.round(4), running_var.round(4)
    (array([0.3, 0. ]), array([1.3667, 1.1667]))

    In evaluation they normalize:

    >>> nf.batch_norm(x[:1], running_mean, running_var).round(3)
    array([[ 0.599, -1.852]], dtype=float32)
    """
    return _core.batch_norm(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        decay,
        running_ddof,
        eps,
        channel_axis,
        out,
        return_stats,
    )


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    training: bool = True,
    channel_axis: int = 1,
    needs: Needs | None = None,
    out: Array | None = None,
) -> tuple[Gradient, Gradient, Gradient]:
    """Gradients of `batch_norm` by `x`, `weight` and `bias`.

    Parameters
    ----------
    dy : array_like
        Gradient by the result of `batch_norm`, of the shape and dtype of `x`.
    x : array_like
        What `batch_norm` was given.
    mean, rstd : array_like
        What `batch_norm` returned with ``return_stats=True``, of shape ``(C,)``. Any floating dtype.
    weight : array_like, optional
        What `batch_norm` was given.
    training : bool, optional
        What `batch_norm` was given. False holds the statistics constant (frozen batch norm). Default: True, unlike
        that of `batch_norm`.
    channel_axis : int, optional
        What `batch_norm` was given. Default: 1.
    needs : sequence of {"x", "weight", "bias"}, optional
        The gradients to compute. Default: ``("x",)`` without `weight`, else all. Parameter gradients that are asked
        for without `weight` are those at a weight of ones.
    out : ndarray, optional
        Array for `dx`, of its shape and dtype and with any strides. It may be `dy` or `x` itself; it may not overlap
        an input in any other way.

    Returns
    -------
    dx : ndarray or None
        Gradient by `x`, `out` if given; of the shape and dtype of `x`.
    dweight, dbias : ndarray or None
        Gradients by `weight` and `bias`, of shape ``(C,)``; of the dtype of `weight`, of `x` without one. They are
        accumulated in float32 or better and rounded once.

    What `needs` leaves out is None.

    Raises
    ------
    TypeError
        If `x` is complex, object or string, if `dy` has another dtype than `x`, if the dtype of `weight`, `mean` or
        `rstd` is none of the above, if `needs` is a string, if `out` is not an array of the dtype of `dx`, or if
        another argument has the wrong type.
    ValueError
        If `x` has fewer than two axes, if a channel has no values in training, if an argument has the wrong shape, if
        `needs` holds an unknown name or one twice, if `out` is given although "x" is not needed, or if `out` is
        read-only or overlaps itself or an input.
    numpy.exceptions.AxisError
        If `channel_axis` is out of range.

    See Also
    --------
    batch_norm : The forward function, and the source of `mean` and `rstd`.

    Notes
    -----
    With the means and sums taken over the cells of a channel, and ``xhat = (x - mean) * rstd``::

        g = dy * weight
        dx = rstd * (g - mean(g) - xhat * mean(g * xhat))      (training)
        dx = rstd * g                                          (not training)
        dweight = sum(dy * xhat)
        dbias = sum(dy)

    Where ``rstd`` is infinite (constant data and ``eps=0``) the output does not depend on `x`: `dx` is 0 there, and so
    is the contribution to `dweight`.

    Examples
    --------
    >>> import numpy as np
    >>> import normfast as nf
    >>> x = np.array([[1.0, -2.0], [2.0, 0.0], [3.0, 2.0], [6.0, 0.0]])
    >>> weight = np.array([1.0, 2.0])
    >>> y, mean, rstd = nf.batch_norm(x, weight=weight, training=True, return_stats=True)
    >>> dy = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    >>> dx, dweight, dbias = nf.batch_norm_backward(dy, x, mean, rstd, weight)
    >>> dx.round(3)
    array([[ 0.248, -0.354],
           [-0.21 , -0.354],
           [-0.134, -0.354],
           [ 0.095,  1.061]])
    >>> dweight.round(3)
    array([-1.069,  0.   ])

    With the statistics held constant:

    >>> dx, dweight, dbias = nf.batch_norm_backward(dy, x, mean, rstd, weight, training=False)
    >>> dx.round(3)
    array([[0.535, 0.   ],
           [0.   , 0.   ],
           [0.   , 0.   ],
           [0.   , 1.414]])
    """
    return _core.batch_norm_backward(dy, x, mean, rstd, weight, training, channel_axis, needs, out)
