"""The arrays of one case, and what the operation is in plain array terms.

Every contender of a case is given the same arrays. `View` describes the operation once for everybody who computes it
with whole-array expressions (NumPy, JAX): a reshape, the axes of the statistics, the axes of the parameter gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .shapes import Case

EPS = {"rms_norm": 1e-6}  # the defaults of normfast, given to every contender
EPS_DEFAULT = 1e-5
_BLOCK = 1 << 18  # cells


def numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array on a cache line's boundary. NumPy aligns to 16 bytes, so that cells small enough for the cache
    would otherwise change their speed from run to run, for everybody."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def present(results: Iterable) -> tuple:
    """Results without the gradients that were not asked for."""
    return tuple(one for one in results if one is not None)


@dataclass(frozen=True)
class View:
    shape: tuple[int, ...]  # x reshaped
    axes: tuple[int, ...]  # reduced by the statistics
    stats: tuple[int, ...]  # shape of mean and rstd, broadcasting against the view
    parameters: tuple[int, ...]  # shape of weight and bias, broadcasting against the view
    gradient_axes: tuple[int, ...]  # reduced by dweight and dbias


def view_of(case: Case) -> View:
    shape = case.shape
    if case.per_row:
        axis = case.axis % len(shape)
        view, axes, along = shape, (axis,), (axis,)
    elif case.family == "batch_norm":
        channel = case.channel_axis % len(shape)
        view, axes, along = shape, tuple(i for i in range(len(shape)) if i != channel), (channel,)
    else:
        groups = case.groups or case.channels
        if case.channels_last:
            view = (*shape[:-1], groups, shape[-1] // groups)
            axes = (*range(1, len(shape) - 1), len(shape))
            along = (len(shape) - 1, len(shape))
        else:
            view = (shape[0], groups, shape[1] // groups, *shape[2:])
            axes, along = tuple(range(2, len(view))), (1, 2)
    stats = tuple(1 if i in axes else n for i, n in enumerate(view))
    parameters = tuple(n if i in along else 1 for i, n in enumerate(view))
    return View(view, axes, stats, parameters, tuple(i for i in range(len(view)) if i not in along))


class Problem:
    """Inputs and the float64 result of a case. Inputs are N(0, 1), the weight is near one."""

    def __init__(self, case: Case, seed: int = 1234) -> None:
        from normfast import reference  # here, so that reports can be made where normfast is not installed

        self._reference = reference
        self.case = case
        self.dtype = numpy_dtype(case.dtype)
        self.eps = EPS.get(case.family, EPS_DEFAULT)
        self.view = view_of(case)
        rng = np.random.default_rng(seed)
        self.x = self._normal(rng, case.shape)
        self.dy = self._normal(rng, case.shape) if case.backward else None
        self.weight = (1 + 0.1 * rng.standard_normal(case.channels)).astype(self.dtype)
        self.bias = (0.1 * rng.standard_normal(case.channels)).astype(self.dtype)
        self.running_mean = (0.1 * rng.standard_normal(case.channels)).astype(np.float32)
        self.running_var = (1 + 0.1 * rng.random(case.channels)).astype(np.float32)

    def _normal(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        result = aligned(shape, self.dtype)
        draw = np.float64 if self.dtype == np.float64 else np.float32
        if draw == self.dtype:
            rng.standard_normal(dtype=draw, out=result)
        else:
            result[...] = rng.standard_normal(shape, dtype=draw)
        return result

    @cached_property
    def _forward(self) -> tuple[np.ndarray, ...]:
        """y and the statistics of normfast.reference."""
        case, x, w, b = self.case, self.x, self.weight, self.bias
        if self._blocks:
            return self._forward_in_blocks()
        if case.family == "layer_norm":
            return self._reference.layer_norm(x, w, b, axis=case.axis, eps=self.eps, return_stats=True)
        if case.family == "rms_norm":
            return self._reference.rms_norm(x, w, axis=case.axis, eps=self.eps, return_stats=True)
        keywords = {"channel_axis": case.channel_axis, "eps": self.eps, "return_stats": True}
        if case.family == "group_norm":
            return self._reference.group_norm(x, case.groups, w, b, **keywords)
        if case.family == "instance_norm":
            return self._reference.instance_norm(x, w, b, **keywords)
        if case.op == "batch_norm_eval":
            return self._reference.batch_norm(x, self.running_mean, self.running_var, w, b, training=False, **keywords)
        return self._reference.batch_norm(x, None, None, w, b, training=True, **keywords)

    @cached_property
    def mean(self) -> np.ndarray:
        """Mean of every reduction, in the shape of normfast's statistics."""
        return self._statistic(self._forward[1])

    @cached_property
    def rstd(self) -> np.ndarray:
        return self._statistic(self._forward[-1])

    def _statistic(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(value).astype(np.float32 if self.dtype.itemsize == 2 else np.float64)

    @cached_property
    def expected(self) -> tuple[np.ndarray, ...]:
        """What every contender must return: (y,) or (dx, dweight, dbias), RMS norm without dbias; or (dx,)."""
        case = self.case
        if not case.backward:
            return (self._forward[0],)
        if self._blocks:
            return self._backward_in_blocks()[: len(self.needs)]
        function = getattr(self._reference, case.op)
        statistics = (self.rstd,) if case.family == "rms_norm" else (self.mean, self.rstd)
        where = {"axis": case.axis} if case.per_row else {"channel_axis": case.channel_axis}
        return present(function(self.dy, self.x, *statistics, self.weight, needs=self.needs, **where))

    @property
    def needs(self) -> tuple[str, ...]:
        """The gradients that the case asks for, as normfast's ``needs``."""
        every = ("x", "weight") if self.case.family == "rms_norm" else ("x", "weight", "bias")
        return every if self.case.parameter_gradients else every[:1]

    @cached_property
    def _blocks(self) -> list[slice]:
        """Rows to compute at a time where x is large: the reference needs many times the memory of its input."""
        if not self.case.per_row or self.case.axis != -1 or self.case.size < 2 * _BLOCK:
            return []
        rows, step = self.case.shape[0], max(1, _BLOCK // self.case.channels)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _forward_in_blocks(self) -> tuple[np.ndarray, ...]:
        y, statistics = np.empty_like(self.x), []
        for rows in self._blocks:
            if self.case.family == "rms_norm":
                part = self._reference.rms_norm(self.x[rows], self.weight, eps=self.eps, return_stats=True)
            else:
                part = self._reference.layer_norm(self.x[rows], self.weight, self.bias, eps=self.eps, return_stats=True)
            y[rows] = part[0]
            statistics.append(part[1:])
        return y, *(np.concatenate(parts) for parts in zip(*statistics, strict=True))

    def _backward_in_blocks(self) -> tuple[np.ndarray, ...]:
        # With a float64 weight the partial parameter gradients are float64 too, and their sum is not rounded.
        dx, weight, sums = np.empty_like(self.x), self.weight.astype(np.float64), 0
        for rows in self._blocks:
            dy, x, rstd = self.dy[rows], self.x[rows], self.rstd[rows]
            if self.case.family == "rms_norm":
                part = self._reference.rms_norm_backward(dy, x, rstd, weight)
            else:
                part = self._reference.layer_norm_backward(dy, x, self.mean[rows], rstd, weight)
            dx[rows] = part[0]
            sums = sums + np.array(part[1:])
        return dx, *sums

    def forget(self) -> None:
        """Drop the float64 results once they have been compared: they are twice as large as x or more."""
        statistics = (self.mean, self.rstd) if self.case.backward else None
        for name in ("_forward", "expected"):
            self.__dict__.pop(name, None)
        if statistics is not None:
            self.__dict__["mean"], self.__dict__["rstd"] = statistics
