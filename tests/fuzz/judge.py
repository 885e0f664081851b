"""Makes a call and judges it.

A wrong one must be refused in the documented way, any other must give the right results. No byte may be written beside
them, no input changed, no reference kept.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from math import prod

import numpy as np

import normfast as nf
from _cases import EPS
from _checks import F16, F64, assert_forward, assert_gradients, assert_stats, stat_dtype
from _oracle import exact

from .calls import CONTROLS, OPS, described

SMALL = 1 << 26  # bytes: for less than this, there is no want of memory


class Find(Exception):
    """Something that the library must not do."""


def require(true, *about):
    if not true:
        raise Find(" ".join(map(str, about)))


def judge(call):
    """The verdict in a few words, the same for calls of the same kind; raises Find."""
    if call.function in CONTROLS:
        return judge_control(call)
    arrays = [a for a in call.arguments.values() if isinstance(a, np.ndarray)]
    references = [sys.getrefcount(a) for a in arrays]
    verdict = judge_once(call)
    require([sys.getrefcount(a) for a in arrays] == references, "keeps or loses a reference to an argument")
    return verdict


def judge_once(call):
    before = [(memory, memory.tobytes()) for memory in memories(call)]
    written = [(k, call.arguments.get(k)) for k in written_arguments(call)]
    kept = {k: (a, a.copy()) for k, a in written if isinstance(a, np.ndarray)}
    results, error = outcome(call)
    if error is not None:
        judge_error(call, *error)
        verdict = f"{call.function} {error[0].__name__} {re.sub(r'[0-9]+|<.*?>', '#', error[1])}"
    else:
        require(not call.wrong, "succeeds")
        results = results if isinstance(results, tuple) else (results,)
        check_results(call, results)
        if call.tame:
            check_values(call, results, {k: a.copy() for k, (a, _) in kept.items()})
        for a, values in kept.values():  # what was to be written is put back: nothing else may differ then
            a[...] = values
        verdict = f"{call.function} {results[0].dtype if results[0] is not None else None} {layout_of(call)}"
    for memory, bytes_before in before:
        require(memory.tobytes() == bytes_before, "writes to an input, beside `out`, or although it refuses")
    return verdict


def outcome(call):
    """What the call returns, or the type and text of its error."""
    try:
        with np.errstate(all="ignore"):  # NumPy may warn of an overflow where it casts an argument
            return getattr(nf, call.function)(**call.arguments), None
    except Exception as error:
        return None, (type(error), str(error))


def memories(call):
    """Every block of memory that an argument lies in, once each."""
    blocks = list(call.memory)
    for value in call.arguments.values():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fV" and not any(value.base is b for b in blocks):
            owner = value
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            if not any(owner is b for b in blocks):
                blocks.append(owner)
    return blocks


def written_arguments(call):
    training = call.function == "batch_norm" and call.case.training
    return ("out", "running_mean", "running_var") if training else ("out",)


def layout_of(call):
    """A few words that tell ways through the library apart."""
    about = [k for k in ("weight", "bias", "out", "running_mean") if call.arguments.get(k) is not None]
    x = call.arguments["x"]
    about.append(type(x).__name__ if not isinstance(x, np.ndarray) else str(np.argsort(x.strides, kind="stable")))
    return " ".join([*about, str(call.case.axis), str(bool(prod(call.case.shape))), str(call.arguments.get("needs"))])


# ---- refusals --------------------------------------------------------------------------------------------------------


def judge_error(call, kind, text):
    if kind is MemoryError:
        require(sum(m.nbytes for m in memories(call)) > SMALL, "MemoryError for a small call:", text)
        return
    require(issubclass(kind, (ValueError, TypeError)), f"raises {kind.__name__}: {text}")
    require(call.wrong, f"is refused: {kind.__name__}: {text}")
    require(len(text) > 20, "says too little:", text)
    if call.foreign:
        return
    begins = text.startswith((f"{call.function}: ", f"{call.function}() "))
    require(begins, "does not begin with its name:", text)
    if len(call.wrong) == 1:
        # Of two arguments that must fit, either may be named: the running statistics, mean and rstd of a group norm.
        either = {"running_mean": ("running_",), "running_var": ("running_",), "mean": ("mean", "rstd")}
        names = either.get(call.wrong[0], (call.wrong[0], "got input shape"))
        require(any(name in text for name in names), "does not name the argument:", text)


def judge_control(call):
    result, error = outcome(call)
    if error is not None:
        kind, text = error
        require(issubclass(kind, (ValueError, TypeError)), f"raises {kind.__name__}: {text}")
        require(call.wrong, f"is refused: {kind.__name__}: {text}")
        require(re.match(rf"(nf\.)?(threads\.)?(__init__|{call.function})(: |\(\) )", text), "begins otherwise:", text)
        return f"{call.function} {kind.__name__}"
    require(not call.wrong, "succeeds")
    if call.function == "threads":
        with result:
            pass
    return call.function


# ---- results ---------------------------------------------------------------------------------------------------------


def result_dtype(values):
    return F64 if values.dtype.kind in "biu" else values.dtype


def check_results(call, results):
    """Number, types, dtypes, shapes, memory order; memory of their own."""
    case, arguments = call.case, call.arguments
    dtype = result_dtype(call.values["x"])
    stats = [(case.stat_shape, stat_dtype(dtype))] * (2 if case.has_mean else 1)
    if call.function in OPS:
        expected = [(case.shape, dtype), *(stats if arguments.get("return_stats") else [])]
    else:
        weight = call.values.get("weight")
        own = dtype if weight is None else result_dtype(weight)
        needs = arguments.get("needs", case.names if weight is not None else ("x",))
        each = {"x": (case.shape, dtype), "weight": (case.param_shape, own), "bias": (case.param_shape, own)}
        expected = [each[name] if name in needs else None for name in case.names]
    require(len(results) == len(expected), f"returns {len(results)} results, not {len(expected)}")
    out = arguments.get("out")
    for i, (result, shape_dtype) in enumerate(zip(results, expected, strict=True)):
        if shape_dtype is None:
            require(result is None, f"result {i} is not None")
            continue
        shape, dtype = shape_dtype
        if i == 0 and out is not None:
            require(result is out, "does not return `out` itself")
            continue
        require(type(result) is np.ndarray, f"result {i} is a {type(result).__name__}")
        right = result.shape == shape and result.dtype == dtype
        require(right, f"result {i} is {described(result)}, not {dtype} {shape}")
        require(result.flags.writeable and result.flags.aligned, f"result {i} cannot be used")
        for memory in memories(call):
            require(not np.may_share_memory(result, memory), f"result {i} shares memory with an argument")
        if i == 0:
            x = np.asarray(arguments["x"])
            require(order_is_right(result, x), f"has the memory order {result.strides} for {described(x)}")


def order_is_right(result, x):
    """That of x where x is a permuted contiguous array, else C."""
    if x.size:
        order = sorted((a for a in range(x.ndim) if x.shape[a] > 1), key=lambda a: -x.strides[a])
        packed, span = True, x.itemsize
        for axis in reversed(order):
            packed = packed and x.strides[axis] == span
            span *= x.shape[axis]
        if packed:
            return [result.strides[a] // result.itemsize for a in order] == [x.strides[a] // x.itemsize for a in order]
    return result.flags.c_contiguous


def check_values(call, results, after):
    """Against the exact results, within what is promised."""
    case, values, arguments = call.case, call.values, call.arguments
    dtype = result_dtype(values["x"])
    x = values["x"].astype(dtype)
    if prod(case.shape) == 0:
        require(all(r is None or not r.any() for r in results[1:] if call.function not in OPS), "gradients of nothing")
        return
    out = after.get("out")
    results = (out if out is not None else results[0], *results[1:])
    try:
        if call.function in OPS:
            check_forward(call, x, results, after)
        else:
            check_backward(call, x, results)
    except AssertionError as error:
        raise Find(f"wrong: {error} (out: {described(arguments.get('out'))})") from error


def widened(case, x, want, values):
    """The exact results with a larger ulp: of max |xhat| * max |weight| + max |bias|.

    Promised is that of max (|xhat * weight| + |bias|), which docs/numerics.md takes back for few cells whose weights
    differ by a thousand and more.
    """
    g, weight, bias = case.geometry, values.get("weight"), values.get("bias")
    d = np.abs(g.rows(x) - (want.mean.reshape(-1, 1) if case.has_mean else 0)).max(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        scale = np.where(d > 0, d * want.rstd.reshape(-1, 1), 0)
    scale = scale * (1 if weight is None else np.abs(exact(weight)).max())
    scale = scale + (0 if bias is None else np.abs(exact(bias)).max())
    return replace(want, scale=g.unrows(np.broadcast_to(scale, g.cells.shape)))


def check_backward(call, x, results):
    case, values = call.case, call.values
    weight, dy = values.get("weight"), values["dy"].astype(x.dtype)
    if not call.honest and case.geometry.cells.shape[1] == 1:  # x is its own mean then, and that is relied on
        return
    want = case.exact_backward(dy, x, values.get("mean"), values["rstd"], weight)
    wide = x.dtype == F64 and (weight is None or weight.dtype == F64)
    # Above the promised 1e-6, for sums of a few cells that cancel to little more than a tenth of their terms; and far
    # above for statistics that are not those of x, which leave larger terms to cancel.
    limit = (1e-10 if wide else 4e-6) * (1 if call.honest else 100)
    for name, result in zip(("dx", "dweight", "dbias"), results, strict=False):
        if result is not None and result.dtype == F16 and np.abs(getattr(want, name)).max(initial=0) > 65_000:
            return  # infinity is right
    # Where such a mean nearly is x, nothing but rounding errors is left for dweight.
    compared = results if call.honest else results[:1]
    assert_gradients([None if r is None else native(r) for r in compared], want, limit)


def native(array):
    return array.astype(array.dtype.newbyteorder("="))


def check_forward(call, x, results, after):
    case, values, arguments = call.case, call.values, call.arguments
    eps = float(arguments.get("eps", EPS.get(case.op, 1e-5)))
    running = None
    if case.op == "batch_norm" and not case.training:
        running = values["running_mean"], values["running_var"]
    want = case.exact_forward(x, values.get("weight"), values.get("bias"), eps=eps, running=running)
    far = (np.abs(want.mean) > 1e4 * np.sqrt(want.var)) & (want.var > 0)
    if x.dtype == F64 and far.any():  # further from zero than is promised for float64
        return
    assert_forward(native(results[0]), widened(case, x, want, values))
    if len(results) > 1 and running is None and np.isfinite(exact(want.rstd)).all():
        mean = results[1] if case.has_mean else None
        assert_stats(mean, results[-1], want, x.dtype)
    if "running_mean" in after:
        n = prod(case.shape) // case.param_shape[0]
        weight = 1 - float(arguments["decay"]) if "decay" in arguments else float(arguments.get("momentum", 0.1))
        var = want.var * n / (n - int(arguments.get("running_ddof", 1)))
        for name, batch in (("running_mean", want.mean), ("running_var", var)):
            expected = (1 - weight) * exact(values[name]) + weight * batch
            close = 4e-3 if values[name].dtype.itemsize == 2 else 1e-6
            if values[name].dtype.name == "bfloat16":
                close = 1e-2
            got = exact(native(after[name]))
            slack = close * (np.abs(expected) + np.abs(exact(values[name])) + np.abs(batch) + np.sqrt(want.var))
            assert (np.abs(got - expected) <= slack).all(), f"{name} is off"
