"""A call of the public functions out of bytes: any bytes are one, and it knows whether it must succeed.

First a good call is drawn: function, shape, dtypes, layouts, options. Then some of its arguments may be spoiled, each
in a way that the function has to refuse. Nothing but the bytes decides, so a find is replayed from its bytes alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np

from _cases import Case
from _checks import BF16, DTYPES, F16, F32, F64, stat_dtype

OPS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm")
WHOLE = [np.dtype(t) for t in ("i8", "i4", "u1", "?")]
LENGTHS = (3, 1, 2, 4, 5, 6, 7, 8, 9, 12, 16, 17, 33, 64, 65, 0)
LONG = (100, 257, 1025, 4099)
MOST = 20_000  # cells
MARGIN = 64  # bytes on both sides of every array

_normal = np.random.Generator(np.random.PCG64(0)).standard_normal(3 * MOST)


class Draw:
    """Decisions out of bytes. Where these end, every decision is the first choice, which is the plainest one."""

    def __init__(self, data):
        self._data = data
        self._at = 0

    def below(self, n):
        value = 0
        for _ in range(((n - 1).bit_length() + 7) // 8):
            value = value << 8 | (self._data[self._at] if self._at < len(self._data) else 0)
            self._at += 1
        return value % n

    def pick(self, choices):
        return choices[self.below(len(choices))]

    def rarely(self, n):
        """Yes, one time in n."""
        return self.below(n) == n - 1

    def order(self, n):
        """A permutation of 0 to n - 1."""
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = i - self.below(i + 1)
            order[i], order[j] = order[j], order[i]
        return tuple(order)


@dataclass
class Call:
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # the arguments for which it must be refused; none: it must succeed
    foreign: bool = False  # NumPy itself may refuse an argument, in its own words
    case: Case | None = None
    values: dict[str, np.ndarray] = field(default_factory=dict)  # what the good arguments hold
    memory: list[np.ndarray] = field(default_factory=list)  # all that the arrays lie in, margins included
    tame: bool = True  # finite and of moderate size, so that the promised accuracy holds
    honest: bool = True  # the statistics that backward is given are those of x

    def __str__(self):
        listed = ", ".join(f"{k}={described(v)}" for k, v in self.arguments.items())
        return f"{self.function}({listed})" + (f" is wrong in {', '.join(self.wrong)}" if self.wrong else "")


def described(value):
    if isinstance(value, np.ndarray):
        about = f"{value.dtype.str if value.dtype.kind != 'V' else value.dtype}{list(value.shape)}"
        about += "" if value.flags.c_contiguous else f" strides {value.strides}"
        about += "" if value.flags.writeable else " read-only"
        return about if type(value) is np.ndarray else f"{type(value).__name__} {about}"
    return f"{value!r:.60}"


class Subclass(np.ndarray):
    """An ndarray, but not exactly."""


class Wrapper:
    """Not an ndarray, but one inside."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return self._array

    def __repr__(self):
        return f"Wrapper({described(self._array)})"


# ---- arrays ----------------------------------------------------------------------------------------------------------

LAYOUTS = (*["plain"] * 5, *["permuted"] * 2, "gaps", "reversed", "record", "unaligned", "repeated", "swapped", "any")


def laid_out(draw, call, values, *, repeated=True, swapped=True):
    """The same values in an array of some layout, between margins; with zero strides, the values of the first cells."""
    layout = draw.pick(LAYOUTS)
    dtype, shape, some = values.dtype, values.shape, layout == "any"
    order = draw.order(values.ndim) if layout == "permuted" or some else range(values.ndim)
    cell = dtype.itemsize
    if layout == "record" or some:  # a field among others: whole cells of distance, or such that none is aligned
        cell += draw.pick((dtype.itemsize, 1, 3))
    strides, start, span = [0] * values.ndim, 0, cell
    for axis in reversed(order):
        if repeated and (layout == "repeated" or some) and draw.rarely(2):
            continue
        strides[axis] = span
        if layout == "gaps" or some:
            strides[axis] *= 1 + draw.below(3)
        span = strides[axis] * max(shape[axis], 1)
        if (layout == "reversed" or some) and draw.rarely(2):
            start += strides[axis] * max(shape[axis] - 1, 0)
            strides[axis] = -strides[axis]
    start += MARGIN + (1 + draw.below(7) if layout == "unaligned" or some else 0)
    memory = np.full(span + 2 * MARGIN + 8, 0xA5, np.uint8)
    if swapped and (layout == "swapped" or (some and draw.rarely(2))):
        dtype = dtype.newbyteorder("S")
    array = np.ndarray(shape, dtype, memory, start, strides)
    array[...] = values
    call.memory.append(memory)
    return array


def numbers(draw, shape, dtype, *, tame):
    """Values of a dtype, from a stretch of the same normal numbers."""
    count = prod(shape)
    at = draw.below(1 << 16) % (len(_normal) - count)
    values = _normal[at : at + count].reshape(shape)
    if dtype.kind == "b":
        return values > 0
    kind = draw.pick(("ordinary", "ordinary", "far", "constant", "small") if tame else ("special", "large"))
    if kind == "special":
        values = np.where(values > 1.5, draw.pick((np.nan, np.inf, -np.inf)), values)
    elif kind == "large":
        values = values * {F16: 1e4, F64: 1e307}.get(dtype, 1e37)
    elif kind == "constant":
        values = np.full(shape, 0.1 + at % 7)
    elif kind == "far":
        values = values + 100
    elif kind == "small":
        values = values * 1e-3
    with np.errstate(all="ignore"):
        return (values * 5).clip(0, 99).astype(dtype) if dtype.kind in "iu" else values.astype(dtype)


# ---- good calls ------------------------------------------------------------------------------------------------------


def drawn(data):
    """The call that these bytes are."""
    draw = Draw(data)
    if draw.rarely(64):
        return control(draw)
    op, backward = draw.pick(OPS), draw.rarely(2)
    call = Call(op + "_backward" * backward)
    call.tame = not draw.rarely(8)
    call.case = case = geometry(draw, call, op)
    (backward_arguments if backward else forward_arguments)(draw, call, case)
    for _ in range(draw.pick((0, 0, 0, 0, 1, 1, 1, 1, 1, 2))):
        spoil(draw, call)
    return call


def geometry(draw, call, op):
    """Shape, axes, groups. A reduction over nothing, or over one value per channel, makes the call wrong."""
    axes = op in ("layer_norm", "rms_norm")
    rank = draw.pick((2, 1, 3, 4, 2, 0, 5) if axes else (2, 3, 4, 5))
    shape = [draw.pick(LENGTHS) for _ in range(rank)]
    if rank and draw.rarely(24):
        shape[draw.below(rank)] = draw.pick(LONG)
    while prod(filter(None, shape)) > MOST:
        shape[int(np.argmax(shape))] = 2
    case = Case(op, tuple(shape))
    if axes:
        chosen = tuple(a - rank * draw.below(2) for a in draw.order(rank)[: draw.below(rank + 1)][::-1])
        if rank and not chosen and not draw.rarely(4):
            chosen = (-1,)
        case = case.with_(axis=chosen[0] if len(chosen) == 1 and not draw.rarely(4) else chosen)
        reduced = prod(case.param_shape)
    else:
        first = 0 if op == "batch_norm" else 1
        channel = rank - 1 - draw.below(rank - first)
        channels = shape[channel]
        reduced = prod(shape) // channels if channels else prod(n for a, n in enumerate(shape) if a != channel)
        case = case.with_(channel_axis=channel - rank * draw.below(2))
        if op == "batch_norm":
            case = case.with_(training=not draw.rarely(3))
            if not case.training:
                reduced = 1
            elif channels and reduced == 1:
                reduced = 0
        else:
            groups = channels
            if op == "group_norm":
                groups = draw.pick([g for g in range(1, channels + 1) if channels % g == 0] or [1])
                case = case.with_(num_groups=groups)
            reduced = channels * prod(n for a, n in enumerate(shape) if a not in (0, channel)) if groups else 1
    if reduced == 0:
        call.wrong.append("x")
    return case


def disguised(draw, call, array):
    """Now and then, what is not quite an array of NumPy's but can be taken as one."""
    way = draw.pick(("",) * 10 + ("subclass", "wrapper", "frozen", "memoryview", "list"))
    if way == "subclass":
        return array.view(Subclass)
    if way == "wrapper":
        return Wrapper(array)
    if way == "frozen":
        array.flags.writeable = False
    if way == "memoryview" and array.dtype.isnative and array.dtype in (F32, F64):
        return memoryview(array)
    if way == "list" and array.dtype == F64 and array.size:
        return array.tolist()
    return array


def given(draw, call, name, values, *, disguise=True, **layout):
    """Puts an array of these values among the arguments."""
    array = laid_out(draw, call, values, **layout)
    call.values[name] = np.array(array, array.dtype.newbyteorder("="), order="C")
    call.arguments[name] = disguised(draw, call, array) if disguise else array


def cells(draw, call, case):
    """The dtype of x; x itself goes among the arguments."""
    dtype = draw.pick((F32, F32, F64, F16, BF16, F32, F64, WHOLE[0], *WHOLE[1:]))
    given(draw, call, "x", numbers(draw, case.shape, dtype, tame=call.tame))
    return F64 if dtype in WHOLE else dtype


def parameter(draw, call, name, case, dtype):
    if not draw.rarely(3):
        own = draw.pick((dtype, F32, F64))
        given(draw, call, name, numbers(draw, case.param_shape, own, tame=call.tame))


def whereabouts(call, case):
    call.arguments |= {"axis": case.axis} if case.axis is not None else {"channel_axis": case.channel_axis}


def result_array(draw, call, dtype, alias):
    """Now and then an `out`: an array of its own, or one of the inputs."""
    way = draw.pick(("none", "none", "new", "same"))
    x = call.arguments[alias]
    if way == "same" and isinstance(x, np.ndarray):
        call.arguments["out"] = x
        fit = x.dtype == dtype and x.dtype.isnative and x.flags.writeable
        if not fit or (x.size and any(s == 0 and n > 1 for s, n in zip(x.strides, x.shape, strict=True))):
            call.wrong.append("out")
    elif way == "new":
        array = laid_out(draw, call, np.zeros(call.case.shape, dtype), repeated=False, swapped=False)
        call.arguments["out"] = array.view(Subclass) if draw.rarely(16) else array


def forward_arguments(draw, call, case):
    dtype = cells(draw, call, case)
    if case.op == "group_norm":
        call.arguments["num_groups"] = case.num_groups
    if case.op == "batch_norm":
        running_statistics(draw, call, case, dtype)
    parameter(draw, call, "weight", case, dtype)
    if case.has_bias:
        parameter(draw, call, "bias", case, dtype)
    whereabouts(call, case)
    if draw.rarely(2):
        call.arguments["eps"] = draw.pick((1e-3, 0.0, 1, 1e-5, np.float32(0.5), Fraction(1, 64), True, np.array(0.25)))
    result_array(draw, call, dtype, "x")
    if draw.rarely(2):
        call.arguments["return_stats"] = draw.pick((True, 1, np.True_, False))


def running_statistics(draw, call, case, dtype):
    call.arguments["training"] = case.training
    if case.training and draw.rarely(2):
        return
    for name in ("running_mean", "running_var"):
        values = numbers(draw, case.param_shape, draw.pick((F32, F64, dtype)), tame=True)
        if name == "running_var":
            values = (np.abs(values.astype(F64)) + 0.8).astype(values.dtype)
        given(draw, call, name, values, disguise=not case.training, repeated=not case.training)
    rate = draw.pick((None, None, "momentum", "decay"))
    if rate:
        call.arguments[rate] = draw.pick((0.25, 0, 1, 0.5, True))
    if draw.rarely(3):
        call.arguments["running_ddof"] = draw.pick((0, 1, np.int64(0), True))


def backward_arguments(draw, call, case):
    dtype = cells(draw, call, case)
    given(draw, call, "dy", numbers(draw, case.shape, dtype, tame=call.tame))
    statistics(draw, call, case, dtype)
    parameter(draw, call, "weight", case, dtype)
    whereabouts(call, case)
    if case.op == "batch_norm":
        call.arguments["training"] = case.training
    if draw.rarely(2):
        names = [case.names[i] for i in draw.order(len(case.names))][: draw.below(len(case.names) + 1)]
        call.arguments["needs"] = draw.pick((tuple, list))(names)
    result_array(draw, call, dtype, draw.pick(("dy", "x")))
    if "out" in call.arguments and "x" not in call.arguments.get("needs", ("x",)):
        call.wrong.append("out")


def statistics(draw, call, case, dtype):
    """Those of x, or any numbers: backward takes them as they are. In any floating dtype."""
    names = ("mean", "rstd") if case.has_mean else ("rstd",)
    call.honest = call.tame and not call.wrong and prod(case.shape) > 0 and not draw.rarely(2)
    if call.honest:
        values = dict(zip(("mean", "rstd"), case.exact_stats(call.values["x"].astype(dtype)), strict=True))
        dtypes = (stat_dtype(dtype), F64, np.dtype(np.longdouble))
    else:
        made = [numbers(draw, case.stat_shape, F64, tame=True).astype(stat_dtype(dtype)) for _ in names]
        values = {"mean": made[0], "rstd": 0.5 + np.abs(made[-1]) % 2}
        dtypes = (stat_dtype(dtype), *DTYPES, np.dtype(np.longdouble))
    for name in names:
        given(draw, call, name, values[name].astype(draw.pick(dtypes)), repeated=not call.honest)


# ---- spoiled arguments -----------------------------------------------------------------------------------------------

NOT_ARRAYS = (None, "text", b"text", object(), {}, 1j, [1j], ["a"], np.zeros(3, "M8[s]"), np.zeros((), "f4,f4"))
SCALARS: dict[str, tuple[Any, ...]] = {
    "eps": (float("nan"), float("inf"), -1e-9, "1e-5", None, 1j, [1e-5], np.zeros(2), 10**400, object(), -(10**30)),
    "momentum": (-0.1, 1.5, float("nan"), float("inf"), "0.1", None, 1j, [0.1], 10**400),
    "decay": (-0.1, 1.5, float("nan"), float("inf"), "0.1", 1j, [0.1], 10**400),
    "running_ddof": (2, -1, "1", None, 0.5, 1.0, 10**30, float("nan")),
    "training": (np.zeros(2), np.ones((3, 3))),
    "return_stats": (np.zeros(2), np.ones((3, 3))),
    "needs": ("x", b"x", "", 5, True, ("x", "x"), ("y",), ("x", 1), (None,), ["weight", "X"], {"x": 0, "dx": 1}, 1.5),
    "num_groups": (0, -3, 10**30, -(10**30), 3.0, "3", None, (1,), float("nan"), np.ones(2)),
    "channel_axis": (100, -100, 10**30, -(10**30), 1.0, "1", None, (1,), float("nan"), object()),
    "axis": (100, -100, 10**30, 1.0, "1", None, [0], (0, 100), (0.5,), (None,), ("x",), (0, 0), float("nan"), ([0],)),
}
DTYPES_OF_NOTHING = [np.dtype(t) for t in ("c8", "c16", "O", "U4", "S4", "M8[s]", "m8[s]")]


def spoil(draw, call):
    """Makes one argument wrong, and says which."""
    name = draw.pick([*call.arguments, "eps", "return_stats", "out", "needs", "epsilon", "missing"])
    backward = call.function.endswith("_backward")
    if name in SCALARS:
        bad = draw.pick(SCALARS[name])
    elif name == "out":
        spoil_out(draw, call)
        return
    elif name == "epsilon":
        bad = 1
    elif name == "missing":
        gone = "dy" if backward and draw.rarely(2) else "x"
        call.arguments.pop(gone, None)
        call.values.pop(gone, None)
        call.wrong.append(gone)
        return
    else:
        bad = spoiled_array(draw, call, name)
    call.arguments[name] = bad
    call.wrong.append(name)


def other_shape(draw, shape):
    n = len(shape)
    longer = [(*shape[:i], shape[i] + 1, *shape[i + 1 :]) for i in range(n)]
    shorter = [(*shape[:i], shape[i] - 1, *shape[i + 1 :]) for i in range(n) if shape[i]]
    others = [*longer, *shorter, (*shape, 1), (1, *shape), shape[1:], (), (0,), (1,), (0, *shape[1:])]
    return draw.pick([s for s in others if s != shape])


def spoiled_array(draw, call, name):
    old = call.values.get(name)
    required = name in ("x", "dy", "mean", "rstd")
    if old is None or draw.rarely(3):
        call.foreign = True
        return draw.pick([v for v in NOT_ARRAYS if v is not None or required or name.startswith("running")])
    if name != "x" and draw.rarely(2):
        return laid_out(draw, call, np.ones(other_shape(draw, old.shape), old.dtype))
    dtype = draw.pick(DTYPES_OF_NOTHING)
    if name in ("weight", "bias", "running_mean", "running_var"):
        x = call.values.get("x")
        others = [t for t in (F16, BF16) if x is not None and t != x.dtype]
        dtype = draw.pick([*DTYPES_OF_NOTHING, *WHOLE, np.dtype(np.longdouble), *others])
    return np.zeros(old.shape, dtype)


def spoil_out(draw, call):
    """Wrong in kind, dtype, shape, byte order; read-only, overlapping itself, or partly another argument."""
    call.wrong.append("out")
    shape, x = call.case.shape, call.arguments.get("x")
    dtype = call.values["x"].dtype if "x" in call.values else F32
    dtype = F64 if dtype in WHOLE else dtype
    way = draw.pick(("dtype", "shape", "swapped", "frozen", "repeated", "shifted", "object"))
    good = np.zeros(shape, dtype)
    if way == "shape":
        good = np.zeros(other_shape(draw, shape), dtype)
    elif way == "dtype":
        good = good.astype(draw.pick([t for t in (F32, F64, F16, BF16, WHOLE[0], np.dtype("c8")) if t != dtype]))
    elif way == "swapped":
        good = good.astype(dtype.newbyteorder("S"))
    elif way == "frozen":
        good.flags.writeable = False
    elif way == "repeated" and good.size and max(shape, default=1) > 1:
        axis = int(np.argmax(shape))
        good = np.zeros([1 if a == axis else n for a, n in enumerate(shape)], dtype)
        good = np.ndarray(shape, dtype, good, 0, [0 if a == axis else s for a, s in enumerate(good.strides)])
    elif way == "shifted" and good.size > 1 and isinstance(x, np.ndarray) and x.dtype == dtype:
        memory = np.zeros(good.size + 1, dtype)  # x begins a cell later
        call.arguments["x"] = memory[1:].reshape(shape)
        good = memory[:-1].reshape(shape)
    else:
        good = draw.pick(("text", [0.0], (good,), 5, object(), memoryview(good) if dtype == F32 else b"", {}))
    call.arguments["out"] = good


# ---- threads, pool, configuration ------------------------------------------------------------------------------------

_NOT_COUNTS = (-1, 10**30, -(10**30), 1.5, 2.0, "2", None, [2], float("nan"), np.zeros(2), object())
CONTROLS: dict[str, tuple[str, tuple[Any, ...], tuple[Any, ...]]] = {  # argument, good values, bad ones
    "set_num_threads": ("n", (1, 2, 3, np.int64(2), True), (0, 1 << 20, *_NOT_COUNTS)),
    "threads": ("n", (1, 2, np.uint8(3)), (0, 1 << 20, *_NOT_COUNTS)),
    "set_pool_limit": ("nbytes", (1 << 28, 0, np.int64(1 << 20), 1 << 40), _NOT_COUNTS),
    "show_config": ("mode", ("dicts",), ("json", "", 3, None, b"dicts", ["dicts"], object())),
    "get_num_threads": ("n", (), (1,)),
    "release_pool": ("n", (), (1,)),
}


def control(draw):
    function = draw.pick(tuple(CONTROLS))
    name, good, bad = CONTROLS[function]
    call = Call(function)
    if draw.rarely(2):
        call.arguments[name] = draw.pick(bad)
        call.wrong.append(name)
    elif good:
        call.arguments[name] = draw.pick(good)
    return call
