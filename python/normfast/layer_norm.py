# SPDX-License-Identifier: BSD-3-Clause

"""Layer norm, forward and backward."""

from __future__ import annotations

from typing import Literal, overload

from . import _core
from ._typing import Array, ArrayLike, Axis, Gradient, Needs

__all__ = ["layer_norm", "layer_norm_backward"]


@overload
def layer_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    out: Array | None = None,
    return_stats: Literal[False] = False,
) -> Array: ...
@overload
def layer_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    out: Array | None = None,
    return_stats: Literal[True],
) -> tuple[Array, Array, Array]: ...
@overload
def layer_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    out: Array | None = None,
    return_stats: bool,
) -> Array | tuple[Array, Array, Array]: ...
def layer_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    out: Array | None = None,
    return_stats: bool = False,
) -> Array | tuple[Array, Array, Array]:
    """Normalize over the given axes.

    Each sample is normalized by itself: every group of cells that differ only in their index along `axis` is shifted
    to mean 0 and scaled to variance 1, then multiplied by `weight` and shifted by `bias`.

    Parameters
    ----------
    x : array_like
        float16, bfloat16 (``ml_dtypes``), float32 or float64, with any strides and byte order. Integers and booleans
        are computed as float64.
    weight, bias : array_like, optional
        Factor and summand of each normalized cell, of the shape of `x` along `axis`, the axes in the order that they
        have in `x`. The dtype is that of `x`, float32 or float64. Either may be given without the other.
    axis : int or tuple of ints, optional
        The axes to normalize over, exactly these, as in `numpy.mean`. Default: the last.
    eps : float, optional
        Added to the variance. Finite, 0 or more. Default: 1e-5.
    out : ndarray, optional
        Array for the result, of its shape and dtype and with any strides. It may be `x` itself; it may not overlap `x`
        or the parameters in any other way.
    return_stats : bool, optional
        Whether to return the mean and ``rstd`` too, which `layer_norm_backward` needs. Default: False.

    Returns
    -------
    y : ndarray
        The normalized array, `out` if given. It has the shape and dtype of `x` (float64 if `x` holds integers or
        booleans) in native byte order, and the memory order of `x` where that is a permuted contiguous array, else C
        order.
    mean, rstd : ndarray
        Only with ``return_stats=True``. The mean and ``1 / sqrt(var + eps)``, of the shape of `x` with length 1 along
        `axis`; float32 for 16-bit `x`, else float64.

    Raises
    ------
    TypeError
        If `x` is complex, object or string, if the dtype of `weight` or `bias` is none of the above, if `out` is not an
        array of the dtype of the result, or if another argument has the wrong type.
    ValueError
        If there are no cells to normalize over, if `weight`, `bias` or `out` has the wrong shape, if an axis is given
        twice, if `eps` is negative or not finite, or if `out` is read-only or overlaps itself or an input.
    numpy.exceptions.AxisError
        If an axis is out of range.

    See Also
    --------
    layer_norm_backward : The gradients.
    rms_norm : The same without the mean.

    Notes
    -----
    With the mean and the biased variance taken over `axis` [1]_::

        y = (x - mean) / sqrt(var + eps) * weight + bias

    Equal cells give exactly `bias` (0 without one), with ``eps=0`` too; ``rstd`` is then infinite.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> import normfast as nf
    >>> nf.layer_norm(np.array([4.0, 6213.0, 347.0]), eps=0).round(4)
    array([-0.7664,  1.4125, -0.6461])

    Weight and bias have the shape of the normalized axes:

    >>> x = np.array([[1, 2, 3, 6], [-2, 0, 2, 0]], dtype=np.float32)
    >>> weight = np.array([1, 1, 2, 2], dtype=np.float32)
    >>> y, mean, rstd = nf.layer_norm(x, weight, return_stats=True)
    >>> y.round(3)
    array([[-1.069, -0.535,  0.   ,  3.207],
           [-1.414,  0.   ,  2.828,  0.   ]], dtype=float32)
    >>> mean
    array([[3.],
           [0.]])
    """
    return _core.layer_norm(x, weight, bias, axis, eps, out, return_stats)


def layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    needs: Needs | None = None,
    out: Array | None = None,
) -> tuple[Gradient, Gradient, Gradient]:
    """Gradients of `layer_norm` by `x`, `weight` and `bias`.

    Parameters
    ----------
    dy : array_like
        Gradient by the result of `layer_norm`, of the shape and dtype of `x`.
    x : array_like
        What `layer_norm` was given.
    mean, rstd : array_like
        What `layer_norm` returned with ``return_stats=True``: of the shape of `x` with length 1 along `axis`. Any
        floating dtype.
    weight : array_like, optional
        What `layer_norm` was given.
    axis : int or tuple of ints, optional
        What `layer_norm` was given. Default: the last.
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
        Gradients by `weight` and `bias`, of the shape of `x` along `axis`; of the dtype of `weight`, of `x` without
        one. They are accumulated in float32 or better and rounded once.

    What `needs` leaves out is None.

    Raises
    ------
    TypeError
        If `x` is complex, object or string, if `dy` has another dtype than `x`, if the dtype of `weight`, `mean` or
        `rstd` is none of the above, if `needs` is a string, if `out` is not an array of the dtype of `dx`, or if
        another argument has the wrong type.
    ValueError
        If there are no cells to normalize over, if an argument has the wrong shape, if an axis is given twice, if
        `needs` holds an unknown name or one twice, if `out` is given although "x" is not needed, or if `out` is
        read-only or overlaps itself or an input.
    numpy.exceptions.AxisError
        If an axis is out of range.

    See Also
    --------
    layer_norm : The forward function, and the source of `mean` and `rstd`.

    Notes
    -----
    With the means taken over `axis`, the sums over all other axes, and ``xhat = (x - mean) * rstd``::

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
    >>> x = np.array([[1.0, 2.0, 3.0, 6.0], [-2.0, 0.0, 2.0, 0.0]])
    >>> weight = np.array([1.0, 1.0, 2.0, 2.0])
    >>> y, mean, rstd = nf.layer_norm(x, weight, return_stats=True)
    >>> dy = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    >>> dx, dweight, dbias = nf.layer_norm_backward(dy, x, mean, rstd, weight)
    >>> dx.round(3)
    array([[ 0.248, -0.21 , -0.134,  0.095],
           [-0.354, -0.354, -0.354,  1.061]])
    >>> dweight.round(3)
    array([-1.069,  0.   ,  0.   ,  0.   ])
    >>> dbias
    array([1., 0., 0., 1.])
    """
    return _core.layer_norm_backward(dy, x, mean, rstd, weight, axis, needs, out)
