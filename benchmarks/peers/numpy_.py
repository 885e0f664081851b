"""NumPy: the plain whole-array expression."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from . import formulas
from .base import Contender, Peer


class NumPy(Peer):
    name = "numpy"

    def open(self, threads: int) -> str:
        return np.__version__

    def prepare(self, problem: Problem, recycled: bool) -> Contender:
        # Temporaries are part of the expression; in the recycled mode the allocator hands their memory out again.
        x, weight, bias = problem.x, problem.weight, problem.bias
        if problem.case.backward:
            dy, mean, rstd = problem.dy, problem.mean, problem.rstd
            if problem.case.family == "rms_norm":
                mean = None
            return Contender(lambda: formulas.backward(np, problem, dy, x, mean, rstd, weight), tuple)
        statistics = ()
        if problem.case.op == "batch_norm_eval":
            statistics = (problem.running_mean, problem.running_var)
        return Contender(lambda: formulas.forward(np, problem, x, weight, bias, *statistics), lambda y: (y,))


PEER = NumPy()
