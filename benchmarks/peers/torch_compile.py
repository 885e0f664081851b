"""PyTorch through ``torch.compile`` (Inductor): the functions of `torch_`, fused by its compiler."""

from __future__ import annotations

from ..native import CACHE
from ..problem import Problem
from .base import Contender, Lacks, Peer
from .torch_ import Torch, function_of, to_numpy, to_torch


class TorchCompile(Peer):
    name = "torch.compile"
    slow_start = True

    def environment(self, threads: int) -> dict[str, str]:
        # The generated code is kept between runs; it is compiled anew for every shape and number of threads.
        return {"TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}

    def open(self, threads: int) -> str:
        self._eager = Torch()
        version = self._eager.open(threads)
        self.torch = self._eager.torch
        return version

    def prepare(self, problem: Problem, recycled: bool) -> Contender:
        torch = self.torch
        torch._dynamo.reset()  # every case starts with empty caches: their limits are per function, not per case
        if problem.case.op == "rms_norm_backward":
            function, arguments = self._rms_backward(problem)
        else:
            function, arguments = function_of(torch, problem)
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        try:
            compiled(*arguments)
        except Exception as error:
            raise Lacks(f"does not compile: {str(error).strip().splitlines()[0][:120]}") from error
        return Contender(lambda: compiled(*arguments), lambda result: to_numpy(torch, problem, result))

    def _rms_backward(self, problem: Problem):
        """No kernel to lower: the formula itself."""
        x, dy, weight, rstd = (to_torch(self.torch, a) for a in (problem.x, problem.dy, problem.weight, problem.rstd))
        compute = self.torch.float32 if problem.dtype.itemsize <= 4 else self.torch.float64
        n, leading = problem.case.channels, tuple(range(len(problem.case.shape) - 1))

        def function(dy, x, rstd, weight):
            a, g = x.to(compute), dy.to(compute)
            xhat = a * rstd
            gw = g * weight.to(compute)
            dx = rstd * (gw - xhat * ((gw * xhat).sum(-1, keepdim=True) / n))
            if not problem.case.parameter_gradients:
                return (dx.to(x.dtype),)
            return dx.to(x.dtype), (g * xhat).sum(leading).to(weight.dtype)

        return function, [dy, x, rstd.to(compute), weight]


PEER = TorchCompile()
