# SPDX-License-Identifier: BSD-3-Clause

"""Group norm, forward and backward."""

from __future__ import annotations

from typing import Literal, overload

from . import _core
from ._typing import Array, ArrayLike, Gradient, Needs

__all__ = ["group_norm", "group_norm_backward"]


@overload
def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    return_stats: Literal[False] = False,
) -> Array: ...
@overload
def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    return_stats: Literal[True],
) -> tuple[Array, Array, Array]: ...
@overload
def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    return_stats: bool,
) -> Array | tuple[Array, Array, Array]: ...
def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    return_stats: bool = False,
) -> Array | tuple[Array, Array, Array]:
    """Normalize each group of channels of each sample.

    The channels of a sample (axis 0) are split into `num_groups` groups of consecutive channels. Each group, with all
    its cells, is shifted to mean 0 and scaled to variance 1; then each channel is multiplied by its `weight` and
    shifted by its `bias`.

    Parameters
    ----------
    x : array_like
        float16, bfloat16 (``ml_dtypes``), float32 or float64, with any strides and byte order; at least two axes, the
        first for the samples. Integers and booleans are computed as float64.
    num_groups : int
        How many groups. It divides the number of channels.
    weight, bias : array_like, optional
        Factor and summand of each channel, of shape ``(C,)``. The dtype is that of `x`, float32 or float64. Either may
        be given without the other.
    channel_axis : int, optional
        The axis of the channels, any but 0; -1 for channels-last arrays. Default: 1.
    eps : float, optional
        Added to the variance. Finite, 0 or more. Default: 1e-5.
    out : ndarray, optional
        Array for the result, of its shape and dtype and with any strides. It may be `x` itself; it may not overlap `x`
        or the parameters in any other way.
    return_stats : bool, optional
        Whether to return the mean and ``rstd`` too, which `group_norm_backward` needs. Default: False.

    Returns
    -------
    y : ndarray
        The normalized array, `out` if given. It has the shape and dtype of `x` (float64 if `x` holds integers or
        booleans) in native byte order, and the memory order of `x` where that is a permuted contiguous array, else C
        order.
    mean, rstd : ndarray
        Only with ``return_stats=True``. The mean and ``1 / sqrt(var + eps)`` of each group, of shape
        ``(N, num_groups)``; float32 for 16-bit `x`, else float64.

    Raises
    ------
    TypeError
        If `x` is complex, object or string, if the dtype of `weight` or `bias` is none of the above, if `out` is not an
        array of the dtype of the result, or if another argument has the wrong type.
    ValueError
        If `x` has fewer than two axes or groups without cells, if `num_groups` is less than 1 or does not divide the
        number of channels, if `channel_axis` is 0, if `weight`, `bias` or `out` has the wrong shape, if `eps` is
        negative or not finite, or if `out` is read-only or overlaps itself or an input.
    numpy.exceptions.AxisError
        If `channel_axis` is out of range.

    See Also
    --------
    group_norm_backward : The gradients.
    instance_norm : Groups of one channel.
    layer_norm : With ``axis`` all axes but the first, one group of all channels and parameters for every cell.

    Notes
    -----
    With the mean and the biased variance taken over the cells of a group [1]_::

        y = (x - mean) / sqrt(var + eps) * weight + bias

    Equal cells give exactly `bias` (0 without one), with ``eps=0`` too; ``rstd`` is then infinite.

    References
    ----------
    .. [1] Y. Wu and K. He, "Group Normalization", ECCV 2018, arXiv:1803.08494.

    Examples
    --------
    Two samples of four channels of two cells, in two groups:

    >>> import numpy as np
    >>> import normfast as nf
    >>> x = np.array([[[1, 2], [3, 6], [-2, 0], [2, 0]], [[0, 8], [4, 4], [1, 1], [1, 1]]], dtype=np.float32)
    >>> y, mean, rstd = nf.group_norm(x, 2, return_stats=True)
    >>> mean
    array([[3., 0.],
           [4., 1.]])
    >>> y.round(3)
    array([[[-1.069, -0.535],
            [ 0.   ,  1.604],
            [-1.414,  0.   ],
            [ 1.414,  0.   ]],
    <BLANKLINE>
           [[-1.414,  1.414],
            [ 0.   ,  0.   ],
            [ 0.   ,  0.   ],
            [ 0.   ,  0.   ]]], dtype=float32)
    """
    return _core.group_norm(x, num_groups, weight, bias, channel_axis, eps, out, return_stats)


def group_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    needs: Needs | None = None,
    out: Array | None = None,
) -> tuple[Gradient, Gradient, Gradient]:
    """Gradients of `group_norm` by `x`, `weight` and `bias`.

    Parameters
    ----------
    dy : array_like
        Gradient by the result of `group_norm`, of the shape and dtype of `x`.
    x : array_like
        What `group_norm` was given.
    mean, rstd : array_like
        What `group_norm` returned with ``return_stats=True``, of shape ``(N, num_groups)``: the number of groups is
        taken from them. Any floating dtype.
    weight : array_like, optional
        What `group_norm` was given.
    channel_axis : int, optional
        What `group_norm` was given. Default: 1.
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
        If `x` has fewer than two axes or groups without cells, if the number of groups does not divide the number of
        channels, if `channel_axis` is 0, if an argument has the wrong shape, if `needs` holds an unknown name or one
        twice, if `out` is given although "x" is not needed, or if `out` is read-only or overlaps itself or an input.
    numpy.exceptions.AxisError
        If `channel_axis` is out of range.

    See Also
    --------
    group_norm : The forward function, and the source of `mean` and `rstd`.

    Notes
    -----
    With the means taken over the cells of a group, the sums over all cells of a channel, and
    ``xhat = (x - mean) * rstd``::

        g = dy * weight
        dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
        dweight = sum(dy * xhat)
        dbias = sum(dy)

    Where ``rstd`` is infinite (constant data and ``eps=0``) the output does not depend on `x`: `dx` is 0 there, and so
    is the contribution to `dweight`.

    Examples
    --------
    >>> import numpy as np
    >>> import normfast as nf
    >>> x = np.array([[[1.0, 2.0], [3.0, 6.0], [-2.0, 0.0], [2.0, 0.0]]])
    >>> weight = np.array([1.0, 1.0, 2.0, 2.0])
    >>> y, mean, rstd = nf.group_norm(x, 2, weight, return_stats=True)
    >>> dy = np.array([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
    >>> dx, dweight, dbias = nf.group_norm_backward(dy, x, mean, rstd, weight)
    >>> dx.round(3)
    array([[[ 0.248, -0.21 ],
            [-0.134,  0.095],
            [-0.354, -0.354],
            [-0.354,  1.061]]])
    >>> dweight.round(3)
    array([-1.069,  0.   ,  0.   ,  0.   ])
    >>> dbias
    array([1., 0., 0., 1.])
    """
    return _core.group_norm_backward(dy, x, mean, rstd, weight, channel_axis, needs, out)
