"""PyTorch, eager: the functional call forward, the kernel that autograd would call backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..problem import Problem, numpy_dtype, present
from .base import Contender, Lacks, Peer, module


class Torch(Peer):
    name = "torch"

    def open(self, threads: int) -> str:
        torch = self.torch = module("torch")
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)  # for the whole process: nothing here but `autograd.grad` needs a graph
        return torch.__version__

    def prepare(self, problem: Problem, recycled: bool) -> Contender:
        case = problem.case
        if case.op == "rms_norm_backward":
            return self._rms_backward(problem)
        function, arguments = function_of(self.torch, problem)
        return Contender(lambda: function(*arguments), lambda result: to_numpy(self.torch, problem, result))

    def _rms_backward(self, problem: Problem) -> Contender:
        """PyTorch has no kernel for it on the CPU; this runs the graph that its forward leaves, again and again."""
        torch = self.torch
        x, weight, dy = (to_torch(torch, a) for a in (problem.x, problem.weight, problem.dy))
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
            y = torch.nn.functional.rms_norm(x, weight.shape, weight, problem.eps)
        grad, inputs = torch.autograd.grad, (x, weight)[: len(problem.needs)]
        return Contender(
            lambda: grad(y, inputs, dy, retain_graph=True),
            lambda result: to_numpy(torch, problem, result),
            note="autograd.grad over the graph of F.rms_norm",
        )


def to_torch(torch: Any, array: np.ndarray) -> Any:
    """The same memory as a tensor; PyTorch does not know NumPy's bfloat16, so that goes through its bits."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_torch(torch: Any, tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()


def channels_first(problem: Problem, tensor: Any) -> Any:
    """PyTorch's shape of the data; the memory stays as it is, so NHWC data become its channels-last format."""
    if problem.case.channels_last:
        return tensor.movedim(-1, 1)
    return tensor


def to_numpy(torch: Any, problem: Problem, result: Any) -> tuple[np.ndarray, ...]:
    large, *parameters = result if isinstance(result, tuple | list) else (result,)
    if problem.case.channels_last:
        large = large.movedim(1, -1)
    return tuple(from_torch(torch, t.detach()) for t in present((large, *parameters)))


def function_of(torch: Any, problem: Problem) -> tuple[Callable[..., Any], list[Any]]:
    """A function of tensors and its arguments; `torch.compile` compiles the same function."""
    case = problem.case
    if case.op == "rms_norm_backward":
        raise Lacks("no kernel")
    functional = torch.nn.functional
    x = channels_first(problem, to_torch(torch, problem.x))
    weight, bias = to_torch(torch, problem.weight), to_torch(torch, problem.bias)
    if case.backward:
        dy = channels_first(problem, to_torch(torch, problem.dy))
        return _BACKWARD[case.family](torch, problem, dy, x, weight, bias)
    eps, shape = problem.eps, weight.shape
    if case.family == "layer_norm" and case.axis != -1:
        to, back = _moves(case.axis)
        return (lambda x, w, b: functional.layer_norm(to(x), shape, w, b, eps).movedim(*back)), [x, weight, bias]
    if case.family == "layer_norm":
        return (lambda x, w, b: functional.layer_norm(x, shape, w, b, eps)), [x, weight, bias]
    if case.family == "rms_norm":
        return (lambda x, w: functional.rms_norm(x, shape, w, eps)), [x, weight]
    if case.family == "group_norm":
        groups = case.groups
        return (lambda x, w, b: functional.group_norm(x, groups, w, b, eps)), [x, weight, bias]
    if case.family == "instance_norm":
        return (lambda x, w, b: functional.instance_norm(x, None, None, w, b, True, 0.1, eps)), [x, weight, bias]
    if case.op == "batch_norm_eval":
        running = [torch.from_numpy(a).to(x.dtype) for a in (problem.running_mean, problem.running_var)]
        return (lambda x, w, b, m, v: functional.batch_norm(x, m, v, w, b, False, 0.1, eps)), [
            x,
            weight,
            bias,
            *running,
        ]
    return (lambda x, w, b: functional.batch_norm(x, None, None, w, b, True, 0.1, eps)), [x, weight, bias]


def _moves(axis: int) -> tuple[Callable[[Any], Any], tuple[int, int]]:
    return (lambda t: t.movedim(axis, -1)), (-1, axis)


def _mask(problem: Problem) -> list[bool]:
    """Which of dx, dweight, dbias a kernel is to compute."""
    return [True, problem.case.parameter_gradients, problem.case.parameter_gradients]


def _layer_norm_backward(torch, problem, dy, x, weight, bias):
    axis, shape, aten, mask = problem.case.axis, list(weight.shape), torch.ops.aten, _mask(problem)
    if axis != -1:
        dy, x = dy.movedim(axis, -1), x.movedim(axis, -1)
    _, mean, rstd = aten.native_layer_norm(x, shape, weight, bias, problem.eps)

    def function(dy, x, mean, rstd, weight, bias):
        dx, dweight, dbias = aten.native_layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, mask)
        return (dx if axis == -1 else dx.movedim(-1, axis)), dweight, dbias

    return function, [dy, x, mean, rstd, weight, bias]


def _batch_norm_backward(torch, problem, dy, x, weight, bias):
    aten, eps, mask = torch.ops.aten, problem.eps, _mask(problem)
    _, mean, rstd = aten.native_batch_norm(x, weight, bias, None, None, True, 0.1, eps)

    def function(dy, x, mean, rstd, weight):
        return aten.native_batch_norm_backward(dy, x, weight, None, None, mean, rstd, True, eps, mask)

    return function, [dy, x, mean, rstd, weight]


def _group_norm_backward(torch, problem, dy, x, weight, bias):
    aten, groups, mask = torch.ops.aten, problem.case.groups, _mask(problem)
    samples, channels = x.shape[:2]
    cells = x.numel() // (samples * channels)
    _, mean, rstd = aten.native_group_norm(x, weight, bias, samples, channels, cells, groups, problem.eps)

    def function(dy, x, mean, rstd, weight):
        return aten.native_group_norm_backward(dy, x, mean, rstd, weight, samples, channels, cells, groups, mask)

    return function, [dy, x, mean, rstd, weight]


def _instance_norm_backward(torch, problem, dy, x, weight, bias):
    # PyTorch computes instance norm as batch norm of one sample with N*C channels.
    aten, eps, mask = torch.ops.aten, problem.eps, _mask(problem)
    samples, channels = x.shape[:2]
    flat = (1, samples * channels, *x.shape[2:])
    _, mean, rstd = aten.native_batch_norm(
        x.reshape(flat), weight.repeat(samples), bias.repeat(samples), None, None, True, 0.1, eps
    )

    def function(dy, x, mean, rstd, weight):
        dx, dweight, dbias = aten.native_batch_norm_backward(
            dy.reshape(flat), x.reshape(flat), weight.repeat(samples), None, None, mean, rstd, True, eps, mask
        )
        parameters = (dweight, dbias) if mask[1] else ()
        return dx.reshape(x.shape), *(p.reshape(samples, channels).sum(0) for p in parameters)

    return function, [dy, x, mean, rstd, weight]


_BACKWARD = {
    "layer_norm": _layer_norm_backward,
    "batch_norm": _batch_norm_backward,
    "group_norm": _group_norm_backward,
    "instance_norm": _instance_norm_backward,
}

PEER = Torch()
