# SPDX-License-Identifier: BSD-3-Clause

"""RMS norm, forward and backward."""

from __future__ import annotations

from typing import Literal, overload

from . import _core
from ._typing import Array, ArrayLike, Axis, Gradient, Needs

__all__ = ["rms_norm", "rms_norm_backward"]


@overload
def rms_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-6,
    out: Array | None = None,
    return_stats: Literal[False] = False,
) -> Array: ...
@overload
def rms_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-6,
    out: Array | None = None,
    return_stats: Literal[True],
) -> tuple[Array, Array]: ...
@overload
def rms_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-6,
    out: Array | None = None,
    return_stats: bool,
) -> Array | tuple[Array, Array]: ...
def rms_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-6,
    out: Array | None = None,
    return_stats: bool = False,
) -> Array | tuple[Array, Array]:
    """Divide by the root mean square over the given axes.

    Every group of cells that differ only in their index along `axis` is scaled to a mean square of 1, then multiplied
    by `weight`. The mean stays: this is `layer_norm` without the shifts.

    Parameters
    ----------
    x : array_like
        float16, bfloat16 (``ml_dtypes``), float32 or float64, with any strides and byte order. Integers and booleans
        are computed as float64.
    weight : array_like, optional
        Factor of each normalized cell, of the shape of `x` along `axis`, the axes in the order that they have in `x`.
        The dtype is that of `x`, float32 or float64.
    axis : int or tuple of ints, optional
        The axes to normalize over, exactly these, as in `numpy.mean`. Default: the last.
    eps : float, optional
        Added to the mean square. Finite, 0 or more. Default: 1e-6.
    out : ndarray, optional
        Array for the result, of its shape and dtype and with any strides. It may be `x` itself; it may not overlap `x`
        or `weight` in any other way.
    return_stats : bool, optional
        Whether to return ``rstd`` too, which `rms_norm_backward` needs. Default: False.

    Returns
    -------
    y : ndarray
        The normalized array, `out` if given. It has the shape and dtype of `x` (float64 if `x` holds integers or
        booleans) in native byte order, and the memory order of `x` where that is a permuted contiguous array, else C
        order.
    rstd : ndarray
        Only with ``return_stats=True``. ``1 / sqrt(mean(x * x) + eps)``, of the shape of `x` with length 1 along
        `axis`; float32 for 16-bit `x`, else float64.

    Raises
    ------
    TypeError
        If `x` is complex, object or string, if the dtype of `weight` is none of the above, if `out` is not an array of
        the dtype of the result, or if another argument has the wrong type.
    ValueError
        If there are no cells to normalize over, if `weight` or `out` has the wrong shape, if an axis is given twice, if
        `eps` is negative or not finite, or if `out` is read-only or overlaps itself or an input.
    numpy.exceptions.AxisError
        If an axis is out of range.

    See Also
    --------
    rms_norm_backward : The gradients.
    layer_norm : The same with the mean taken out.

    Notes
    -----
    With the mean taken over `axis` [1]_::

        y = x / sqrt(mean(x * x) + eps) * weight

    Cells that are all 0 give 0, with ``eps=0`` too; ``rstd`` is then infinite.

    References
    ----------
    .. [1] B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np
    >>> import normfast as nf
    >>> x = np.array([[1, 2, 3, 6], [-2, 0, 2, 0]], dtype=np.float32)
    >>> nf.rms_norm(x).round(3)
    array([[ 0.283,  0.566,  0.849,  1.697],
           [-1.414,  0.   ,  1.414,  0.   ]], dtype=float32)

    Over two axes, with the statistic that backward needs:

    >>> y, rstd = nf.rms_norm(x, axis=(0, 1), return_stats=True)
    >>> rstd.round(4)
    array([[0.3714]])
    """
    return _core.rms_norm(x, weight, axis, eps, out, return_stats)


def rms_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    needs: Needs | None = None,
    out: Array | None = None,
) -> tuple[Gradient, Gradient]:
    """Gradients of `rms_norm` by `x` and `weight`.

    Parameters
    ----------
    dy : array_like
        Gradient by the result of `rms_norm`, of the shape and dtype of `x`.
    x : array_like
        What `rms_norm` was given.
    rstd : array_like
        What `rms_norm` returned with ``return_stats=True``: of the shape of `x` with length 1 along `axis`. Any
        floating dtype.
    weight : array_like, optional
        What `rms_norm` was given.
    axis : int or tuple of ints, optional
        What `rms_norm` was given. Default: the last.
    needs : sequence of {"x", "weight"}, optional
        The gradients to compute. Default: ``("x",)`` without `weight`, else both. The gradient by `weight` that is
        asked for without `weight` is that at a weight of ones.
    out : ndarray, optional
        Array for `dx`, of its shape and dtype and with any strides. It may be `dy` or `x` itself; it may not overlap
        an input in any other way.

    Returns
    -------
    dx : ndarray or None
        Gradient by `x`, `out` if given; of the shape and dtype of `x`.
    dweight : ndarray or None
        Gradient by `weight`, of the shape of `x` along `axis`; of the dtype of `weight`, of `x` without one. It is
        accumulated in float32 or better and rounded once.

    What `needs` leaves out is None.

    Raises
    ------
    TypeError
        If `x` is complex, object or string, if `dy` has another dtype than `x`, if the dtype of `weight` or `rstd` is
        none of the above, if `needs` is a string, if `out` is not an array of the dtype of `dx`, or if another argument
        has the wrong type.
    ValueError
        If there are no cells to normalize over, if an argument has the wrong shape, if an axis is given twice, if
        `needs` holds a name other than "x" and "weight" or one twice, if `out` is given although "x" is not needed, or
        if `out` is read-only or overlaps itself or an input.
    numpy.exceptions.AxisError
        If an axis is out of range.

    See Also
    --------
    rms_norm : The forward function, and the source of `rstd`.

    Notes
    -----
    With the mean taken over `axis`, the sum over all other axes, and ``xhat = x * rstd``::

        g = dy * weight
        dx = rstd * (g - xhat * mean(g * xhat))
        dweight = sum(dy * xhat)

    Where ``rstd`` is infinite (zeros and ``eps=0``) the output is taken not to depend on `x`: `dx` is 0 there, and so
    is the contribution to `dweight`.

    Examples
    --------
    >>> import numpy as np
    >>> import normfast as nf
    >>> x = np.array([[1.0, 2.0, 3.0, 6.0], [-2.0, 0.0, 2.0, 0.0]])
    >>> weight = np.array([1.0, 1.0, 2.0, 2.0])
    >>> y, rstd = nf.rms_norm(x, weight, return_stats=True)
    >>> dy = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    >>> dx, dweight = nf.rms_norm_backward(dy, x, rstd, weight)
    >>> dx.round(3)
    array([[ 0.277, -0.011, -0.017, -0.034],
           [ 0.   ,  0.   ,  0.   ,  1.414]])
    >>> dweight.round(3)
    array([0.283, 0.   , 0.   , 0.   ])
    """
    return _core.rms_norm_backward(dy, x, rstd, weight, axis, needs, out)
