"""JAX: the same expression, compiled by XLA through ``jax.jit``."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from . import formulas
from .base import Contender, Peer, module


class Jax(Peer):
    name = "jax"

    def environment(self, threads: int) -> dict[str, str]:
        # The size of XLA's thread pool; one thread also turns the splitting of loops off.
        flags = {"NPROC": str(threads), "PJRT_NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
        if threads == 1:
            flags["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        return flags

    def open(self, threads: int) -> str:
        self.jax = module("jax")
        self.jax.config.update("jax_enable_x64", True)
        return self.jax.__version__

    def prepare(self, problem: Problem, recycled: bool) -> Contender:
        jax, jnp = self.jax, self.jax.numpy
        case = problem.case
        if case.backward:
            names = ("dy", "x", "mean", "rstd", "weight")
            if case.family == "rms_norm":
                names = ("dy", "x", "rstd", "weight")

            def function(*values):
                given = dict(zip(names, values, strict=True))
                return formulas.backward(jnp, problem, **({"mean": None} | given))
        else:
            names = ("x", "weight", "bias")
            if case.op == "batch_norm_eval":
                names += ("running_mean", "running_var")

            def function(*values):
                return formulas.forward(jnp, problem, *values)

        values = [jnp.asarray(getattr(problem, name)) for name in names]
        compiled = jax.jit(function)
        block = jax.block_until_ready

        def arrays(result):
            return tuple(np.asarray(r) for r in (result if isinstance(result, tuple) else (result,)))

        return Contender(lambda: block(compiled(*values)), arrays, hands_over=True)


PEER = Jax()
