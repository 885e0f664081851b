"""Numba: the loops a NumPy user would write, parallel and with fast mathematics, into an array that is given."""

from __future__ import annotations

import numpy as np

from ..native import CACHE
from ..problem import Problem
from .base import Contender, Lacks, Peer, module


class Numba(Peer):
    name = "numba"

    def environment(self, threads: int) -> dict[str, str]:
        return {"NUMBA_CACHE_DIR": str(CACHE / "numba")}

    def open(self, threads: int) -> str:
        numba = module("numba")
        from . import numba_loops

        self.loops = numba_loops
        self.parts = min(threads, numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(self.parts)
        return numba.__version__

    def prepare(self, problem: Problem, recycled: bool) -> Contender:
        case, loops = problem.case, self.loops
        if problem.dtype.itemsize == 2:
            raise Lacks("no 16-bit floating point on the CPU")
        loop, inputs, view = self._choose(problem)
        view_shape = problem.x.shape if view is None else view
        if loop in loops.WITH_PARTS:
            inputs = [self.parts, *inputs]
        inputs = [a.reshape(view_shape) if a is problem.x or a is problem.dy else a for a in inputs]
        parameters = [np.empty(case.channels, problem.dtype) for _ in range(2)] if case.backward else []
        if loop in loops.WITHOUT_PARAMETERS:
            parameters = []
        elif case.op == "rms_norm_backward":
            parameters.pop()

        def run(out):
            loop(*inputs, out, *parameters)
            return out, *parameters

        def arrays(result):
            wanted = result[1:] if case.parameter_gradients else ()  # most loops compute them on the way
            return (result[0].reshape(case.shape), *(p.copy() for p in wanted))

        if recycled:
            given = np.empty(view_shape, problem.dtype)
            return Contender(lambda: run(given), arrays)
        dtype = problem.dtype
        return Contender(lambda: run(np.empty(view_shape, dtype)), arrays)

    def _choose(self, problem: Problem):
        """The loop, its inputs, and the shape in which it sees the data."""
        loops, case, dtype = self.loops, problem.case, problem.dtype
        x, dy, w, b = problem.x, problem.dy, problem.weight, problem.bias
        eps = dtype.type(problem.eps)
        if case.backward:
            mean, rstd = (np.ascontiguousarray(a.reshape(problem.view.stats), dtype) for a in _statistics(problem))
        if case.per_row and case.axis == -1:
            rows = (case.size // case.channels, case.channels)
            if case.op == "layer_norm":
                return loops.layer_norm, [x, w, b, eps], rows
            if case.op == "rms_norm":
                return loops.rms_norm, [x, w, eps], rows
            if case.op == "rms_norm_backward" and not case.parameter_gradients:
                return loops.rms_norm_backward_x, [dy, x, rstd.ravel(), w], rows
            if case.op == "rms_norm_backward":
                return loops.rms_norm_backward, [dy, x, rstd.ravel(), w], rows
            if not case.parameter_gradients:
                return loops.layer_norm_backward_x, [dy, x, mean.ravel(), rstd.ravel(), w], rows
            return loops.layer_norm_backward, [dy, x, mean.ravel(), rstd.ravel(), w], rows
        if case.per_row:
            before = int(np.prod(case.shape[: case.axis]))
            planes = (before, case.channels, case.size // before // case.channels)
            if case.op == "layer_norm":
                return loops.layer_norm_middle, [x, w, b, eps], planes
            if case.op != "layer_norm_backward" or not case.parameter_gradients:
                raise Lacks("no loop written for this axis")
            statistics = [a.reshape(before, planes[2]) for a in (mean, rstd)]
            return loops.layer_norm_backward_middle, [dy, x, *statistics, w], planes
        samples, channels = case.shape[0], case.channels
        cells = case.size // samples // channels
        if case.family == "batch_norm":
            view, suffix = (samples, channels, cells), ""
            if cells == 1 or case.channels_last:
                view, suffix = (samples * cells, channels), "_last"
            if case.backward:
                return getattr(loops, "batch_norm_backward" + suffix), [dy, x, mean.ravel(), rstd.ravel(), w], view
            if case.op == "batch_norm_eval":
                running = [problem.running_mean.astype(dtype), problem.running_var.astype(dtype)]
                return getattr(loops, "batch_norm_eval" + suffix), [x, *running, w, b, eps], view
            return getattr(loops, "batch_norm" + suffix), [x, w, b, eps], view
        groups = case.groups or channels
        if case.channels_last:
            view, suffix = (samples, cells, groups, channels // groups), "_last"
        else:
            view, suffix = (samples, groups, channels // groups, cells), ""
        if case.backward:
            statistics = [mean.reshape(samples, groups), rstd.reshape(samples, groups)]
            return getattr(loops, "group_norm_backward" + suffix), [dy, x, *statistics, w], view
        return getattr(loops, "group_norm" + suffix), [x, w, b, eps], view


def _statistics(problem: Problem):
    return (problem.rstd if problem.case.family == "rms_norm" else problem.mean), problem.rstd


PEER = Numba()
