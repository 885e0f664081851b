"""Every refusal: its type, its message, and that nothing was written (promise 7).

A message begins with the function's name, names the argument, and says what was expected and what came.
"""

from __future__ import annotations

import re
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from numpy.exceptions import AxisError
from numpy.lib.stride_tricks import as_strided

import normfast as nf
from _checks import BF16, F16, F32, F64, assert_same_bits
from normfast import _core

X = np.linspace(-1, 2, 96).reshape(4, 6, 4) ** 3
X32 = X.astype(F32)


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


class Subclass(np.ndarray):
    pass


def read_only(a):
    a.flags.writeable = False
    return a


def base(function):
    """Good arguments of every function for X32; each case spoils one of them."""
    group = {"num_groups": 3} if function == "group_norm" else {}
    forward = {"x": X32, **group}
    if function == "batch_norm":
        forward |= {"running_mean": zeros(6), "running_var": ones(6)}
    if not function.endswith("_backward"):
        return forward
    shape = {"layer": (4, 6, 1), "rms": (4, 6, 1), "group": (4, 3), "instance": (4, 6), "batch": (6,)}[
        function.split("_")[0]
    ]
    stats = {"mean": zeros(*shape, dtype=F64), "rstd": ones(*shape, dtype=F64)}
    if function.startswith("rms"):
        del stats["mean"]
    return {"dy": X32.copy(), "x": X32, **stats}


FORWARD = ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"]
BACKWARD = [f + "_backward" for f in FORWARD]
CHANNELS = ["group_norm", "instance_norm", "batch_norm"]
WITH_BIAS = ["layer_norm", *CHANNELS]
PARAM = {"layer_norm": 4, "rms_norm": 4}  # length of weight and bias; 6 channels otherwise


def n(function):
    return PARAM.get(function.removesuffix("_backward"), 6)


def table():
    """(function, changed arguments, error, argument named, pattern of what follows)."""
    for f in FORWARD + BACKWARD:
        # x
        for bad, name in [
            (X.astype(np.complex64), "complex64"),
            (X.astype(object), "object"),
            (X.astype(str), r"<U\d+|str\d*"),
            (X.astype(bytes), r"\|?S\d+|bytes\d*"),
            (X.astype("M8[s]"), "datetime64"),
            (X.astype(np.longdouble), "longdouble|float128"),
            (np.zeros(X.shape, "f4,f4"), "void|f4"),
            (X.astype(ml_dtypes.float8_e5m2), "float8_e5m2"),
        ]:
            yield f, {"x": bad}, TypeError, "x", rf"must .*got .*({name})"
        yield f, {"x": None}, TypeError, "x", "must .*got"
        yield f, {"x": "text"}, TypeError, "x", "must .*got"
        # weight
        yield f, {"weight": ones(n(f) + 1)}, ValueError, "weight", rf"must have shape \({n(f)},\).*got \({n(f) + 1},\)"
        yield f, {"weight": ones(1)}, ValueError, "weight", rf"must have shape \({n(f)},\).*got \(1,\)"
        yield f, {"weight": ones(1, n(f))}, ValueError, "weight", rf"must have shape \({n(f)},\).*got \(1, {n(f)}\)"
        yield f, {"weight": np.float32(1)}, ValueError, "weight", rf"must have shape \({n(f)},\).*got \(\)"
        yield f, {"weight": ones(n(f), dtype=F16)}, TypeError, "weight", "must .*got float16"
        yield f, {"weight": ones(n(f), dtype=BF16)}, TypeError, "weight", "must .*got bfloat16"
        yield f, {"weight": ones(n(f), dtype=int)}, TypeError, "weight", "must .*got int64"
        yield f, {"weight": ones(n(f), dtype=complex)}, TypeError, "weight", "must .*got complex128"
        yield f, {"weight": "w"}, TypeError, "weight", "must .*got"
        # out
        yield f, {"out": np.empty((4, 6, 5), F32)}, ValueError, "out", r"must have shape \(4, 6, 4\).*got \(4, 6, 5\)"
        yield (
            f,
            {"out": np.empty((1, 4, 6, 4), F32)},
            ValueError,
            "out",
            r"must have shape \(4, 6, 4\).*got \(1, 4, 6, 4\)",
        )
        yield f, {"out": np.empty((4, 6, 4), F64)}, TypeError, "out", "must .*float32.*got float64"
        yield f, {"out": np.empty((4, 6, 4), ">f4")}, TypeError, "out", "must .*float32.*got .*>f4"
        yield f, {"out": np.empty((4, 6, 4), "i4")}, TypeError, "out", "must .*float32.*got int32"
        yield f, {"out": [0.0]}, TypeError, "out", "must .*got list"
        yield f, {"out": (np.zeros((4, 6, 4), F32),)}, TypeError, "out", "must .*got tuple"
        yield f, {"out": read_only(np.empty((4, 6, 4), F32))}, ValueError, "out", "must be writ.*got.*read"
        # each row reaches into the next; then a column of one cell
        for strides in ((64, 12, 4), (96, 16, 0)):
            yield f, {"out": as_strided(zeros(200), X.shape, strides)}, ValueError, "out", "must not overlap itself"
    for f in WITH_BIAS:
        yield f, {"bias": ones(n(f) + 2)}, ValueError, "bias", rf"must have shape \({n(f)},\).*got \({n(f) + 2},\)"
        yield f, {"bias": ones(n(f), dtype=F16)}, TypeError, "bias", "must .*got float16"
        yield f, {"bias": ones(n(f), dtype=int)}, TypeError, "bias", "must .*got int64"
        yield f, {"weight": ones(n(f)), "bias": ones(n(f), 1)}, ValueError, "bias", rf"must .*got \({n(f)}, 1\)"
    for f in FORWARD:
        yield f, {"return_stats": zeros(2)}, TypeError, "return_stats", "must be True or False, got .*ndarray"
        for bad in (-1e-5, float("nan"), float("inf"), -float("inf"), -1):
            yield f, {"eps": bad}, ValueError, "eps", "must .*got"
        for bad in ("1e-5", None, 1j, [1e-5], zeros(2)):
            yield f, {"eps": bad}, TypeError, "eps", "must .*got"
    for f in ("layer_norm", "rms_norm", "layer_norm_backward", "rms_norm_backward"):
        for bad in (3, -4, 100, (0, 3), (1, -4), 10**30, -(10**30)):
            yield f, {"axis": bad}, AxisError, "axis", "out of bounds|out of range"
        for bad in ((1, 1), (0, -3), (-1, 2)):
            yield f, {"axis": bad}, ValueError, "axis", ".*"
        for bad in (1.0, "1", None, (0.5,), [1, "a"]):
            yield f, {"axis": bad}, TypeError, "axis", "must .*got"
        yield f, {"x": np.float32(3), "dy": np.float32(3)}, AxisError, "axis", "out of bounds|out of range"
    for f in [*CHANNELS, *(c + "_backward" for c in CHANNELS)]:
        for bad in (3, -4, 100):
            yield f, {"channel_axis": bad}, AxisError, "channel_axis", "out of bounds|out of range"
        for bad in (1.0, "1", None, (1,)):
            yield f, {"channel_axis": bad}, TypeError, "channel_axis", "must .*got"
        yield f, {"x": X32[0, 0], "dy": X32[0, 0]}, ValueError, "x", "must have (rank|at least).*got"
        if not f.startswith("batch"):
            for bad in (0, -3):
                yield f, {"channel_axis": bad}, ValueError, "channel_axis", "must .*got"
    f = "group_norm"
    for bad in (4, 5, 12, 0, -3):
        yield f, {"num_groups": bad}, ValueError, "num_groups", rf"must .*got {bad}"
    for bad in (3.0, "3", None, (3,)):
        yield f, {"num_groups": bad}, TypeError, "num_groups", "must .*got"
    yield from batch_norm_table()
    yield from backward_table()


def batch_norm_table():
    f = "batch_norm"
    for training in (False, True):
        yield f, {"training": training, "running_var": None}, ValueError, "running_(mean|var)", "must .*"
        yield f, {"training": training, "running_mean": None}, ValueError, "running_(mean|var)", "must .*"
        for name in ("running_mean", "running_var"):
            some = {"training": training}
            yield f, some | {name: ones(5)}, ValueError, name, r"must have shape \(6,\).*got \(5,\)"
            yield f, some | {name: ones(1, 6)}, ValueError, name, r"must have shape \(6,\).*got \(1, 6\)"
            yield f, some | {name: ones(6, dtype=F16)}, TypeError, name, "must .*got float16"
            yield f, some | {name: ones(6, dtype=int)}, TypeError, name, "must .*got int64"
        for momentum in (-0.1, 1.5, float("nan"), float("inf")):
            yield f, {"training": training, "momentum": momentum}, ValueError, "momentum", "must .*got"
            yield f, {"training": training, "decay": momentum}, ValueError, "decay", "must .*got"
        yield f, {"training": training, "momentum": "0.1"}, TypeError, "momentum", "must .*got"
        yield f, {"training": training, "momentum": None}, TypeError, "momentum", "must .*got"
        yield f, {"training": training, "decay": "0.1"}, TypeError, "decay", "must .*got"
        yield f, {"training": training, "decay": 0.9, "momentum": 0.2}, ValueError, "(decay|momentum)", "must .*"
        for ddof in (2, -1):
            yield f, {"training": training, "running_ddof": ddof}, ValueError, "running_ddof", rf"must .*got {ddof}"
        for ddof in ("1", None, 0.5):
            yield f, {"training": training, "running_ddof": ddof}, TypeError, "running_ddof", "must .*got"
    yield f, {"running_mean": None, "running_var": None}, ValueError, "running_mean", "must .*"
    yield f, {"training": zeros(2)}, TypeError, "training", "must be True or False, got .*ndarray"
    # Two that are written must not lie in each other, nor in what is read.
    twice, room = ones(9), X32.copy()
    both = {"training": True, "running_mean": twice[:6], "running_var": twice[3:]}
    yield f, both, ValueError, "running_mean", "must not overlap running_var, got"
    for name in ("running_mean", "running_var"):
        for other in ("weight", "bias"):
            for kind in (np.ndarray, Subclass):
                shared = {"training": True, name: twice[:6], other: twice[3:].view(kind)}
                yield f, shared, ValueError, name, f"must not overlap {other}, got"
        inside = {"training": True, name: room.reshape(-1)[7:13], "x": room}
        yield f, inside, ValueError, name, "must not overlap x, got"
    for name in ("running_mean", "running_var"):
        yield f, {"training": True, name: read_only(ones(6))}, ValueError, name, "must be writ.*got.*read"
        yield f, {"training": True, name: [1.0] * 6}, TypeError, name, "must .*got list"


def backward_table():
    stats = {"layer": (4, 6, 1), "rms": (4, 6, 1), "group": (4, 3), "instance": (4, 6), "batch": (6,)}
    for f in BACKWARD:
        yield f, {"dy": X32[:3]}, ValueError, "dy", r"must have .*\(4, 6, 4\).*got \(3, 6, 4\)"
        yield f, {"dy": X32[0]}, ValueError, "dy", r"must have .*\(4, 6, 4\).*got \(6, 4\)"
        yield f, {"dy": X}, TypeError, "dy", "must .*float32.*got float64"
        yield f, {"dy": X.astype(F16)}, TypeError, "dy", "must .*float32.*got float16"
        yield f, {"dy": X.astype(complex)}, TypeError, "dy", "must .*float32.*got complex128"
        shape = stats[f.split("_")[0]]
        expected = re.escape(str(shape))
        for name in ("mean", "rstd"):
            if name == "mean" and f.startswith("rms"):
                continue
            if not (f.startswith("group") and name == "mean"):
                yield f, {name: ones(*shape)[..., None]}, ValueError, name, rf"must have shape {expected}.*got"
                yield f, {name: ones(3)}, ValueError, name, rf"must have shape {expected}.*got \(3,\)"
                yield f, {name: np.float64(1)}, ValueError, name, rf"must have shape {expected}.*got \(\)"
            yield f, {name: ones(*shape, dtype=int)}, TypeError, name, "must .*got int64"
            yield f, {name: ones(*shape, dtype=complex)}, TypeError, name, "must .*got complex128"
            yield f, {name: None}, TypeError, name, "must .*got"
        for bad in ("x", "weight", "", b"x"):
            yield f, {"needs": bad}, TypeError, "needs", "must .*got"
        for bad in (5, ("x", 1), (None,), True):
            yield f, {"needs": bad}, TypeError, "needs", "must .*got"
        for bad in (("x", "x"), ("weight", "x", "weight"), ("y",), ("x", "dx"), ("X",)):
            yield f, {"needs": bad}, ValueError, "needs", "must .*got"
        yield f, {"needs": ("weight",), "out": np.empty_like(X32)}, ValueError, "out", "must .*"
        yield f, {"needs": (), "out": np.empty_like(X32)}, ValueError, "out", "must .*"
    yield "rms_norm_backward", {"needs": ("x", "bias")}, ValueError, "needs", "must .*got"
    f = "group_norm_backward"
    for shape in ((4, 5), (4, 0), (4, 7), (3, 3), (4,), (4, 3, 1), ()):
        bad = {"mean": ones(*shape), "rstd": ones(*shape)}
        yield f, bad, ValueError, "mean", rf"must .*got .*{re.escape(str(shape)[:-1])}"
    yield f, {"rstd": ones(4, 2)}, ValueError, "rstd", r"must have shape \(4, 3\).*got \(4, 2\)"
    none = {"x": zeros(4, 0, 4), "dy": zeros(4, 0, 4), "mean": ones(4, 2), "rstd": ones(4, 2)}
    yield f, none, ValueError, "x", r"must have elements in every group, got shape \(4, 0, 4\)"


def describe(case):
    f, changed, error, *_ = case
    values = ",".join(
        f"{k}={v.dtype}{v.shape}" if isinstance(v, np.ndarray) else f"{k}={v!r}" for k, v in changed.items()
    )
    return f"{f}-{values}-{error.__name__}"


@pytest.mark.parametrize("case", list(table()), ids=describe)
def test_refusal(case):
    function, changed, error, argument, pattern = case
    arguments = base(function) | changed
    if not function.endswith("_backward"):
        arguments.pop("dy", None)
    watched = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray) and v.dtype.kind in "fV"}
    watched = {k: v for k, v in watched.items() if k in ("out", "running_mean", "running_var")}
    # A place for the result that a premature write would show in.
    if "out" not in arguments and "x" not in changed and "needs" not in changed:
        arguments["out"] = watched["out"] = np.full(X.shape, 55, F32)
    before = {k: v.tobytes() for k, v in watched.items()}
    with pytest.raises(error) as caught:
        getattr(nf, function)(**arguments)
    # AxisError is a ValueError as well: only the exact type will do.
    assert caught.type is error
    message = str(caught.value)
    assert re.match(rf"{function}: .*\b{argument}\b", message), message
    assert re.search(rf"{argument}\b.*({pattern})", message), message
    assert {k: v.tobytes() for k, v in watched.items()} == before


def test_the_documented_message():
    x = np.zeros((2, 64, 3), F32)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared below
        nf.group_norm(x, 32, ones(32))
    assert str(caught.value) == "group_norm: weight must have shape (64,) to match x axis 1, got (32,)"


def test_axis_error_carries_the_axis():
    """As NumPy's own: `axis` and `ndim` are there for the caller who handles it."""
    for axis, said in [(5, 5), (-7, -7), (10**30, 2**63 - 1), (-(10**30), -(2**63))]:
        for call in (
            lambda a=axis: nf.layer_norm(X32, axis=a),
            lambda a=axis: nf.batch_norm(X32, training=True, channel_axis=a),
        ):
            with pytest.raises(AxisError) as caught:
                call()
            assert (caught.value.axis, caught.value.ndim) == (said, 3)
            assert isinstance(caught.value, ValueError)
            assert isinstance(caught.value, IndexError)


@pytest.mark.parametrize("axis", [9, 10, 63])
def test_the_number_of_a_far_axis(axis):
    """In the text of what a parameter must match: one digit, and two."""
    shape = [2] + [1] * 63
    shape[axis] = 3
    with pytest.raises(
        ValueError, match=rf"^batch_norm: weight must have shape \(3,\) to match x axis {axis}, got \(2,\)$"
    ):
        nf.batch_norm(np.ones(shape), training=True, weight=ones(2), channel_axis=axis)


def test_one_value_per_channel():
    for shape, axis in [((1, 6), 1), ((1, 6, 1), 1), ((1, 1, 6), -1), ((6, 1), 0)]:
        running = zeros(6), ones(6)
        out = np.full(shape, 55, F32)
        with pytest.raises(ValueError, match=r"^batch_norm: .*Expected more than 1 value per channel when training"):
            nf.batch_norm(np.zeros(shape, F32), *running, training=True, channel_axis=axis, out=out)
        assert (out == 55).all()
        assert not running[0].any()
        assert (running[1] == 1).all()


def test_failed_training_leaves_the_running_statistics():
    """The last argument that is checked fails: the running statistics are as they were."""
    running = zeros(6), ones(6)
    for bad in ({"out": np.empty((4, 6, 5), F32)}, {"out": X32[::-1]}, {"bias": ones(7)}, {"eps": -1.0}):
        with pytest.raises(ValueError, match=r"^batch_norm: "):
            nf.batch_norm(X32, *running, training=True, **bad)
        assert not running[0].any()
        assert (running[1] == 1).all()


class OnDevice:
    """The signs by which libraries say that their array lies on a CUDA device."""

    shape, dtype = (4, 6), F32

    def __dlpack__(self, **_):
        raise AssertionError("must not be asked for its memory")

    def __dlpack_device__(self):
        return (2, 0)


class Interface:
    shape, dtype = (4, 6), F32
    __cuda_array_interface__ = {  # noqa: RUF012 - that is how the protocol is
        "shape": (4, 6), "typestr": "<f4", "data": (1 << 20, False), "version": 3, "strides": None,
    }  # fmt: skip


CUDA = nf.show_config("dicts")["cuda"]


@pytest.mark.skipif(CUDA["available"], reason="this machine computes CUDA arrays")
@pytest.mark.parametrize("kind", [OnDevice, Interface])
def test_cuda_arrays_without_cuda(kind):
    """Without the backend a TypeError says how to get it, without a device a RuntimeError why there is none."""
    error = RuntimeError if CUDA["built"] else TypeError
    reason = "no CUDA device: cudaError" if CUDA["built"] else "x is on a CUDA device, .*NORMFAST_CUDA=ON"
    for call in (
        lambda: nf.layer_norm(kind()),
        lambda: nf.rms_norm(kind()),
        lambda: nf.batch_norm(kind(), training=True),
        lambda: nf.layer_norm_backward(kind(), kind(), kind(), kind()),
    ):
        with pytest.raises(error, match=rf"^(layer|rms|batch)_norm(_backward)?: {reason}"):
            call()


@pytest.mark.parametrize("kind", [OnDevice, Interface])
def test_cuda_arrays_beside_host_arrays(kind):
    """x is on the host: whatever else is on a device is refused, with or without the backend."""
    stats = zeros(4, 6, 1), ones(4, 6, 1)
    for name, call in {
        "weight": lambda: nf.layer_norm(X32, kind()),
        "bias": lambda: nf.layer_norm(X32, bias=kind()),
        "out": lambda: nf.layer_norm(X32, out=kind()),
        "running_mean": lambda: nf.batch_norm(X32, kind(), ones(6), training=True),
        "dy": lambda: nf.layer_norm_backward(kind(), X32, *stats),
        "rstd": lambda: nf.rms_norm_backward(X32, X32, kind()),
        "mean": lambda: nf.group_norm_backward(X32, X32, kind(), stats[1]),
    }.items():
        with pytest.raises(TypeError, match=rf"^\w+: {name} is on a CUDA device, but x is on the host; copy it"):
            call()


class Exporter:
    """A library's own array, which NumPy can read, and what it answers when it is asked for its device."""

    def __init__(self, answer):
        self.answer = answer

    def __array__(self, dtype=None, copy=None):
        return X32.copy()

    def __dlpack_device__(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer", [(1, 0), (3, 0), (), [2, 0], 2, None, ("cuda", 0), RuntimeError("lost")], ids=lambda answer: repr(answer)
)
def test_whatever_is_not_on_a_cuda_device_is_read(answer):
    """The CPU, pinned memory, answers that make no sense: NumPy reads the array, and no exception is left behind."""
    assert_same_bits(nf.layer_norm(Exporter(answer)), nf.layer_norm(X32))


def test_managed_memory_is_on_the_device():
    with pytest.raises(TypeError, match=r"^layer_norm: weight is on a CUDA device"):
        nf.layer_norm(X32, Exporter((13, 0)))


def test_what_the_cuda_module_answers(monkeypatch):
    """A call on a device goes to the function of the same name in `_cuda`, with all arguments; what that returns or
    raises comes back, and so does what goes wrong when the module is loaded."""
    x = OnDevice()
    module = types.SimpleNamespace(layer_norm=lambda *arguments: arguments, rms_norm=lambda *_: 1 // 0)
    monkeypatch.setitem(sys.modules, "normfast._cuda", module)
    assert nf.layer_norm(x, axis=0, eps=0.5)[0] is x
    assert nf.layer_norm(x, axis=0, eps=0.5)[1:] == (None, None, 0, 0.5, None, False)
    with pytest.raises(ZeroDivisionError):
        nf.rms_norm(x)
    with pytest.raises(AttributeError, match="batch_norm"):
        nf.batch_norm(x, training=True)

    class Unloadable:
        def find_spec(self, name, path=None, target=None):
            if name == "normfast._cuda":
                raise ImportError("libcudart.so: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "normfast._cuda")
    monkeypatch.setattr(sys, "meta_path", [Unloadable(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"libcudart\.so"):
        nf.layer_norm(x)


def test_flags_are_what_python_takes_for_true():
    for yes, no in [(1, 0), ("a", ""), (np.True_, np.False_), (ones(1), zeros(1))]:
        assert len(nf.layer_norm(X32, return_stats=yes)) == 3
        assert_same_bits(nf.layer_norm(X32, return_stats=no), nf.layer_norm(X32))


def test_entry_points_count_their_arguments():
    """The Python functions always give all; whoever calls the module itself gets no crash."""
    for name, count in {"layer_norm": 7, "rms_norm_backward": 7, "batch_norm": 13, "config": 0}.items():
        for given in (count - 1 if count else 1, count + 1):
            with pytest.raises(TypeError, match=rf"^expected {count} positional arguments, got {given}$"):
                getattr(_core, name)(*[X32] * given)


@pytest.mark.parametrize("name", ["x", "weight", "dy", "rstd"])
def test_numpy_s_reason_comes_behind_the_name(name):
    """Of what no array can be made of; the kind of the error stays as well."""
    function = "rms_norm_backward"

    class Odd:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("made of nothing")

    ragged = [[1.0, 2], [3]]
    for odd, error, reason in [(ragged, ValueError, "setting an array"), (Odd(), TypeError, "made of nothing")]:
        with pytest.raises(error, match=f"^{function}: {name} must be an array: {reason}"):
            getattr(nf, function)(**base(function) | {name: odd})


def test_an_exception_of_the_input_comes_through():
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("no data today")

    with pytest.raises(RuntimeError, match="no data today"):
        nf.layer_norm(Broken())


def test_good_arguments_pass():
    """Negative control of the table: unspoiled, every call succeeds."""
    for function in FORWARD + BACKWARD:
        getattr(nf, function)(**base(function))
