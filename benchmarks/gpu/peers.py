# SPDX-License-Identifier: BSD-3-Clause

"""Who else is measured: PyTorch (with cuDNN where it uses it), torch.compile, JAX; and copies, as limits."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch

from .cases import COMPILED, Case
from .problem import Problem
from .timing import Contender

F = torch.nn.functional
LEAST_FOR_JAX = 60e6  # bytes of x below which its calls take longer than its kernels


class Lacks(Exception):
    """A peer has no such operation, or its time is over; the text says which."""


class Compiling:
    """The seconds that compilers may take, in all and for one function."""

    def __init__(self, total: float, each: float = 25.0) -> None:
        self.left, self.each = total, each

    @contextlib.contextmanager
    def limit(self) -> Iterator[None]:
        if self.left < 1:
            raise Lacks("the time for compilers is over")

        def over(*_: Any) -> None:
            raise Lacks("compiled for too long")

        before = signal.signal(signal.SIGALRM, over)
        began = perf_counter()
        signal.setitimer(signal.ITIMER_REAL, min(self.left, self.each))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self.left -= perf_counter() - began


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def _torch_function(case: Case) -> Callable[..., Any]:
    """y of x, weight, bias, running."""
    if case.op == "layer_norm":
        return lambda x, w, b, r: F.layer_norm(x, (case.channels,), w, b, 1e-5)
    if case.op == "rms_norm":
        return lambda x, w, b, r: F.rms_norm(x, (case.channels,), w, 1e-6)
    if case.op == "group_norm":
        return lambda x, w, b, r: F.group_norm(x, case.groups, w, b, 1e-5)
    if case.op == "instance_norm":
        return lambda x, w, b, r: F.instance_norm(x, weight=w, bias=b, eps=1e-5)
    return lambda x, w, b, r: F.batch_norm(x, *(r or (None, None)), w, b, training=True, eps=1e-5)


def _torch_call(problem: Problem, function: Callable[..., Any]) -> Callable[[int], Any]:
    case = problem.case
    if case.step == "stats":
        raise Lacks("its forward is the same with statistics")
    if not case.backward:
        arguments = problem.weight, problem.bias, problem.running
        return lambda i: function(problem.x[i], *arguments)
    # Views that require gradients; the graph is kept, so that only backward is repeated.
    params = [p.detach() for p in (problem.weight, problem.bias) if p is not None]
    if case.step == "backward":
        params = [p.requires_grad_() for p in params]
    w, b = params[0], params[1] if len(params) > 1 else None
    kept = []
    with torch.enable_grad():
        for x in problem.x:
            x = x.detach().requires_grad_()
            kept.append((function(x, w, b, None), [x, *(p for p in params if p.requires_grad)]))
    return lambda i: torch.autograd.grad(kept[i][0], kept[i][1], problem.dy[i], retain_graph=True)


def eager(problem: Problem, _: Compiling) -> Contender:
    return Contender("torch", _torch_call(problem, _torch_function(problem.case)))


def without_cudnn(problem: Problem, _: Compiling) -> Contender:
    """What PyTorch does itself where it would hand over to cuDNN."""
    if problem.case.op != "batch_norm":
        raise Lacks("PyTorch hands only batch norm over to cuDNN")
    with torch.backends.cudnn.flags(enabled=False):
        call = _torch_call(problem, _torch_function(problem.case))
    if problem.case.backward:
        return Contender("torch without cuDNN", call)  # its graph remembers

    def apart(i: int) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return call(i)

    return Contender("torch without cuDNN", apart)


def compiled(problem: Problem, compiling: Compiling) -> Contender:
    case = problem.case
    if (case.op, case.shape) not in COMPILED or case.last or problem.device == "cpu":
        raise Lacks("not measured at this shape")
    if case.step in ("stats", "dx"):
        raise Lacks("not measured for this pass")
    with compiling.limit():
        with contextlib.suppress(Exception):  # else the graph of the backward pass could not be kept
            from torch._functorch import config

            config.donated_buffer = False
        torch._dynamo.reset()
        function = torch.compile(_torch_function(case), dynamic=False, fullgraph=True)
        call = _torch_call(problem, function)
        call(0)
        torch.cuda.synchronize()
    return Contender("torch.compile", call)


# ---- JAX -------------------------------------------------------------------------------------------------------------


def _views(case: Case) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """How x is seen, the axes that are normalised, the shape of a parameter, the axes of its gradient's sum."""
    if case.per_row:
        return case.shape, (1,), (1, case.channels), (0,)
    n, c, h, w = case.shape
    if case.op == "group_norm":
        g = case.groups
        return (n, g, c // g, h, w), (2, 3, 4), (1, g, c // g, 1, 1), (0, 3, 4)
    return case.shape, (0, 2, 3) if case.op == "batch_norm" else (2, 3), (1, c, 1, 1), (0, 2, 3)


def jax(problem: Problem, compiling: Compiling) -> Contender:
    case = problem.case
    if (case.op, case.shape) not in COMPILED or case.last or case.step in ("stats", "dx"):
        raise Lacks("not measured at this shape")
    if case.nbytes < LEAST_FOR_JAX or problem.device == "cpu":
        raise Lacks("too small for the wall clock")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax as library
    import jax.numpy as jnp

    if library.default_backend() not in ("gpu", "cuda"):
        raise Lacks("JAX sees no GPU")
    seen, axes, param_shape, summed = _views(case)
    single, eps = jnp.float32, 1e-5 if case.center else 1e-6
    kept = tuple(1 if a in axes else n for a, n in enumerate(seen))

    def forward(x: Any, w: Any, b: Any) -> Any:
        v = x.reshape(seen).astype(single)
        if case.center:
            v = v - v.mean(axes, keepdims=True)
        y = v * library.lax.rsqrt((v * v).mean(axes, keepdims=True) + eps) * w.reshape(param_shape).astype(single)
        y = y if b is None else y + b.reshape(param_shape).astype(single)
        return y.astype(x.dtype).reshape(x.shape)

    def backward(dy: Any, x: Any, mean: Any, rstd: Any, w: Any) -> Any:
        d, v = dy.reshape(seen).astype(single), x.reshape(seen).astype(single)
        hat = (v if mean is None else v - mean) * rstd
        g = d * w.reshape(param_shape).astype(single)
        dx = g - hat * (g * hat).mean(axes, keepdims=True)
        dx = rstd * (dx - g.mean(axes, keepdims=True) if case.center else dx)
        sums = [(d * hat).sum(summed), d.sum(summed)][: 1 + case.center]
        return dx.astype(x.dtype).reshape(x.shape), *(s.reshape(-1).astype(w.dtype) for s in sums)

    def over(t: Any) -> Any:
        return None if t is None else jnp.from_dlpack(t)

    with compiling.limit():
        torch.cuda.synchronize()
        x, w, b = [over(t) for t in problem.x], over(problem.weight), over(problem.bias)
        if case.backward:
            dy, function = [over(t) for t in problem.dy], library.jit(backward)
            stats = [tuple(over(s.float().reshape(kept)) for s in some) for some in problem.stats]
            stats = stats if case.center else [(None, *some) for some in stats]

            def call(i: int) -> Any:
                return function(dy[i], x[i], *stats[i], w)
        else:
            function = library.jit(forward)

            def call(i: int) -> Any:
                return function(x[i], w, b)

        library.block_until_ready(call(0))
    return Contender("jax", call, library.block_until_ready)


PEERS: dict[str, Callable[[Problem, Compiling], Contender]] = {
    "torch": eager,
    "torch without cuDNN": without_cudnn,
    "torch.compile": compiled,
    "jax": jax,
}


def limits(problem: Problem) -> list[Contender]:
    """Passes over the same arrays that do nothing else: a copy, a kernel that reads one and writes one, and a sum."""
    x, dy, out = problem.x, problem.dy, problem.out
    found = [Contender("copy", lambda i: out[i].copy_(x[i])), Contender("neg", lambda i: torch.neg(x[i], out=out[i]))]
    if problem.case.backward:
        found.append(Contender("add", lambda i: torch.add(x[i], dy[i], out=out[i])))
    return found


LIMIT_STREAMS = {"copy": 2, "neg": 2, "add": 3}
