"""The operations as whole-array expressions, for every library that offers NumPy's functions (NumPy, JAX).

This is what its users write: a mean, a variance, and one line. 16-bit data are computed in float32.
"""

from __future__ import annotations

from typing import Any

from ..problem import Problem


def _in(dtype: Any, array: Any) -> Any:
    """The array in that dtype, without a copy where it already is."""
    return array if array.dtype == dtype else array.astype(dtype)


def forward(xp: Any, problem: Problem, x: Any, weight: Any, bias: Any, mean: Any = None, var: Any = None) -> Any:
    """y; with ``mean`` and ``var`` given, they are used in place of the statistics of x."""
    view, shape, dtype = problem.view, x.shape, x.dtype
    compute = xp.float32 if dtype.itemsize == 2 else dtype
    x = _in(compute, x.reshape(view.shape))
    weight = _in(compute, weight.reshape(view.parameters))
    bias = _in(compute, bias.reshape(view.parameters))
    if problem.case.family == "rms_norm":
        y = x / xp.sqrt(xp.mean(x * x, axis=view.axes, keepdims=True) + problem.eps) * weight
    else:
        if mean is None:
            mean = x.mean(axis=view.axes, keepdims=True)
            var = x.var(axis=view.axes, keepdims=True)
        else:
            mean = _in(compute, mean.reshape(view.stats))
            var = _in(compute, var.reshape(view.stats))
        y = (x - mean) / xp.sqrt(var + problem.eps) * weight + bias
    return _in(dtype, y.reshape(shape))


def backward(xp: Any, problem: Problem, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> Any:
    """(dx, dweight, dbias), without dbias for RMS norm; or (dx,)."""
    view, shape, dtype = problem.view, x.shape, x.dtype
    compute = xp.float32 if dtype.itemsize == 2 else dtype
    rms = problem.case.family == "rms_norm"
    x, dy = _in(compute, x.reshape(view.shape)), _in(compute, dy.reshape(view.shape))
    rstd = _in(compute, rstd.reshape(view.stats))
    weight_view = _in(compute, weight.reshape(view.parameters))
    xhat = x * rstd if rms else (x - _in(compute, mean.reshape(view.stats))) * rstd
    g = dy * weight_view
    dx = g - xhat * xp.mean(g * xhat, axis=view.axes, keepdims=True)
    if not rms:
        dx = dx - xp.mean(g, axis=view.axes, keepdims=True)
    dx = _in(dtype, (dx * rstd).reshape(shape))
    if not problem.case.parameter_gradients:
        return (dx,)
    dweight = _in(weight.dtype, xp.sum(dy * xhat, axis=view.gradient_axes).reshape(weight.shape))
    if rms:
        return dx, dweight
    return dx, dweight, _in(weight.dtype, xp.sum(dy, axis=view.gradient_axes).reshape(weight.shape))
