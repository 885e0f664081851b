"""The libraries: each takes a sample and returns what it has of y, dx, dweight and dbias, or None for no such op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import numpy as np

import normfast as nf

from ..problem import view_of
from .exact import QUANTITIES
from .inputs import Sample


def _named(y, *gradients):
    return dict(zip(QUANTITIES, (y, *gradients), strict=False))


def through_normfast(s: Sample):
    case, w = s.case, s.weight
    where = {"axis": case.axis} if case.per_row else {"channel_axis": case.channel_axis}
    keywords = where | {"eps": s.eps, "return_stats": True}
    training = {}
    if case.op == "rms_norm":
        y, *stats = nf.rms_norm(s.x, w, **keywords)
    elif case.op == "layer_norm":
        y, *stats = nf.layer_norm(s.x, w, s.bias, **keywords)
    elif case.op == "group_norm":
        y, *stats = nf.group_norm(s.x, case.groups, w, s.bias, **keywords)
    elif case.op == "instance_norm":
        y, *stats = nf.instance_norm(s.x, w, s.bias, **keywords)
    else:
        training = {"training": s.running is None}
        y, *stats = nf.batch_norm(s.x, *(s.running or (None, None)), w, s.bias, **training, **keywords)
    backward = getattr(nf, f"{case.family}_backward")
    results = _named(y, *backward(s.dy, s.x, *stats, w, **training, **where))
    return results | {"stats": (stats[0] if s.bias is not None else None, stats[-1])}


def through_pytorch(s: Sample):
    import torch
    from torch.nn import functional

    def tensor(array):
        if array is None or array.dtype.name != "bfloat16":
            return None if array is None else torch.from_numpy(array)
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)

    def array(value):
        if value.dtype != torch.bfloat16:
            return value.detach().numpy()
        return value.detach().view(torch.int16).numpy().view(s.x.dtype)

    case = s.case
    x, weight, bias = (None if a is None else tensor(a).requires_grad_() for a in (s.x, s.weight, s.bias))
    functions = {
        "layer_norm": lambda: functional.layer_norm(x, weight.shape, weight, bias, s.eps),
        "rms_norm": lambda: functional.rms_norm(x, weight.shape, weight, s.eps),
        "group_norm": lambda: functional.group_norm(x, case.groups, weight, bias, s.eps),
        "instance_norm": lambda: functional.instance_norm(x, None, None, weight, bias, True, eps=s.eps),
        "batch_norm": lambda: functional.batch_norm(x, None, None, weight, bias, True, eps=s.eps),
    }
    y = functions[case.op]()
    y.backward(tensor(s.dy))
    return _named(*(array(a) for a in (y, x.grad, weight.grad, *([] if bias is None else [bias.grad]))))


def through_numpy(s: Sample):
    """The textbook formulas in two passes, everything in the dtype of x."""
    view, dtype = s.view, s.x.dtype.type
    x, dy = s.x.reshape(view.shape), s.dy.reshape(view.shape)
    weight = s.weight.reshape(view.parameters)

    def mean(a):
        return a.mean(axis=view.axes, keepdims=True)

    with np.errstate(all="ignore"):
        centred = x if s.bias is None else x - mean(x)
        rstd = dtype(1) / np.sqrt(mean(centred * centred) + dtype(s.eps))
        normalised = centred * rstd
        g = dy * weight
        dx = g - normalised * mean(g * normalised)
        y = normalised * weight
        if s.bias is not None:
            dx, y = dx - mean(g), y + s.bias.reshape(view.parameters)
        sums = [(dy * normalised).sum(axis=view.gradient_axes), dy.sum(axis=view.gradient_axes)]
    return _named(y, dx * rstd, *sums[: 1 if s.bias is None else 2])


def through_jax(s: Sample):
    """`jax.numpy` under `jit`, the variance by `var`, the gradients by automatic differentiation."""
    parameters = (s.weight,) if s.bias is None else (s.weight, s.bias)
    return _named(*map(np.asarray, _jitted(s.view, s.bias is not None, s.eps)(s.dy, s.x, *parameters)))


@cache
def _jitted(view, centred, eps):
    import jax

    def norm(x, weight, bias=0):
        shape, x = x.shape, x.reshape(view.shape)
        if centred:
            moment = x.var(axis=view.axes, keepdims=True)
            x = x - x.mean(axis=view.axes, keepdims=True)
            bias = bias.reshape(view.parameters)
        else:
            moment = (x * x).mean(axis=view.axes, keepdims=True)
        return (x * jax.lax.rsqrt(moment + eps) * weight.reshape(view.parameters) + bias).reshape(shape)

    @jax.jit
    def forward_backward(dy, x, *parameters):
        y, backward = jax.vjp(norm, x, *parameters)
        return y, *backward(dy)

    return forward_backward


_ONNX = {"layer_norm": 17, "rms_norm": 23, "group_norm": 21, "instance_norm": 17}  # operator set that has the op


def through_onnxruntime(s: Sample):
    """Forward only: a model of one node. It has no batch statistics on the CPU."""
    if s.case.op not in _ONNX:
        return None
    import onnxruntime
    from onnx import helper, numpy_helper

    name = {"rms_norm": "RMSNormalization"}.get(s.case.op) or s.case.op.title().replace("_norm", "_Norm")
    name = name.replace("_Norm", "Normalization")
    attributes = {"epsilon": s.eps}
    if s.case.per_row:
        attributes["axis"] = -1
    elif s.case.op == "group_norm":
        attributes["num_groups"] = s.case.groups
    parameters = {"w": s.weight} if s.bias is None else {"w": s.weight, "b": s.bias}
    kind = helper.np_dtype_to_tensor_dtype(s.x.dtype)
    values = [helper.make_tensor_value_info(name, kind, s.x.shape) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node(name, ["x", *parameters], ["y"], **attributes)],
        "one",
        values[:1],
        values[1:],
        [numpy_helper.from_array(value, name) for name, value in parameters.items()],
    )
    opset = helper.make_opsetid("", _ONNX[s.case.op])
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return _named(session.run(None, {"x": s.x})[0])


def through_sklearn(s: Sample):
    """`StandardScaler` is batch norm of a table with eps=0, without weight and bias: see `standardised`."""
    from sklearn.preprocessing import StandardScaler

    return _named(StandardScaler().fit_transform(s.x))


def standardised(s: Sample) -> Sample:
    """The sample of batch norm that scikit-learn can be given: the same cells, channels last, one column each."""
    table = np.ascontiguousarray(np.moveaxis(s.x, s.case.channel_axis, -1)).reshape(-1, s.case.channels)
    case = replace(s.case, shape=table.shape, channel_axis=1)
    ones, zeros = np.ones_like(s.weight), np.zeros_like(s.weight)
    return replace(s, case=case, view=view_of(case), eps=0.0, x=table, dy=table, weight=ones, bias=zeros)


LIBRARIES: dict[str, tuple[str, Callable]] = {  # name: package, function
    "normfast": ("normfast", through_normfast),
    "PyTorch": ("torch", through_pytorch),
    "NumPy": ("numpy", through_numpy),
    "JAX": ("jax", through_jax),
    "ONNX Runtime": ("onnxruntime", through_onnxruntime),
    "scikit-learn": ("scikit-learn", through_sklearn),
}


def installed() -> dict[str, str]:
    """The libraries found here, with their versions."""
    found = {}
    for name, (package, _) in LIBRARIES.items():
        try:
            found[name] = nf.__version__ if name == "normfast" else version(package)
        except PackageNotFoundError:
            continue
    return found
