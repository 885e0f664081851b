# SPDX-License-Identifier: BSD-3-Clause

"""Arrays on a device, without one: the bindings of `normfast._cuda` with plain loops over the host's memory.

Everything but the kernels is as on a device: protocols, checks, messages, streams, memory, memory order of results.
"""

from __future__ import annotations

import re
import types

import numpy as np
import pytest
from _libraries import STREAM, Exporter, Interface
from numpy.exceptions import AxisError

import normfast as nf
import test_errors
from _cases import LAYOUTS, batch, group, instance, layer, rms
from _checks import BF16, DTYPES, F32, F64, assert_forward, assert_gradients, assert_stats, same_bits

CASES = [
    layer((6, 33)),
    layer((3, 5, 8), axis=1),
    layer((3, 4, 5, 6), axis=(0, 2)),
    rms((6, 33)),
    rms((3, 5, 8), axis=(0, 2)),
    group((3, 6, 10), 2),
    group((3, 10, 6), 2, channel_axis=-1),
    instance((3, 4, 10)),
    batch((6, 4, 10)),
    batch((6, 10, 4), channel_axis=-1),
    batch((6, 4, 10), training=False),
]
KERNELS = {"rows_forward", "rows_backward", "columns_forward", "columns_backward", "affine"}


def on(library, value):
    return None if value is None else library.to(value)


def back(library, values):
    return tuple(None if value is None else library.back(value) for value in values)


def running(library, case):
    """What a call of this case needs besides x, weight and bias."""
    if case.training:
        return {}
    return {"running": tuple(library.to(a) for a in case.running())}


def suits(library, case, dtype):
    return (library.bfloat16 or dtype != BF16) and (library.permuted or case.permutation is None)


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_forward(library, all_on_device, device, case):
    for dtype in DTYPES:
        if not suits(library, case, dtype):
            continue
        x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
        kw = running(library, case)
        arguments = on(library, x), on(library, weight), on(library, bias)
        device.log()
        got = back(library, case.forward(*arguments, return_stats=True, **kw))
        assert {stream for what, stream in device.log() if what in KERNELS | {"copy_cells"}} == {library.stream}
        want = case.exact_forward(x, weight, bias)
        assert got[0].dtype == dtype
        assert_forward(got[0], want)
        assert_stats(got[1], got[2], case.exact_forward(x), dtype)
        if library.permuted:
            assert got[0].strides == x.strides
        assert same_bits(library.back(case.forward(*arguments, **kw)), got[0])


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_backward(library, all_on_device, device, case):
    for dtype in DTYPES:
        if not suits(library, case, dtype):
            continue
        x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(dtype)
        mean, rstd = case.exact_stats(x)
        arguments = [on(library, a) for a in (dy, x, mean, rstd, weight)]
        device.log()
        got = back(library, case.backward(*arguments))
        assert {stream for what, stream in device.log() if what in KERNELS | {"copy_cells"}} == {library.stream}
        assert_gradients(got, case.exact_backward(dy, x, mean, rstd, weight))
        assert got[0].dtype == dtype
        if library.permuted:
            assert got[0].strides == x.strides
        for needs in (("x",), ("weight",), case.names, ()):
            some = case.backward(*arguments, needs=needs)
            for name, value, whole in zip(case.names, some, got, strict=True):
                assert (value is not None) == (name in needs)
                assert value is None or same_bits(library.back(value), whole)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_strided(library, all_on_device, case):
    """Nothing contiguous: copies on the device, results in C order."""
    if not library.strided:
        pytest.skip("the library has no strided arrays")

    def spread(a):
        if a is None or a.ndim == 0:
            return a
        room = np.full((*a.shape[:-1], 2 * a.shape[-1]), 99, a.dtype)
        room[..., ::2] = a
        return room[..., ::2]

    x, dy, weight, bias = case.x(), case.dy(), case.weight(), case.bias()
    kw = {"running": tuple(library.to(spread(a)) for a in case.running())} if case.op == "batch_norm" else {}
    got = case.forward(*(on(library, spread(a)) for a in (x, weight, bias)), return_stats=True, **kw)
    got = back(library, got)
    assert_forward(got[0], case.exact_forward(x, weight, bias))
    assert got[0].flags.c_contiguous
    mean, rstd = case.exact_stats(x)
    got = case.backward(*(on(library, spread(a)) for a in (dy, x, mean, rstd, weight)))
    got = back(library, got)
    assert_gradients(got, case.exact_backward(dy, x, mean, rstd, weight))
    assert all(a is None or a.flags.c_contiguous for a in got)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_out(library, all_on_device, case):
    if not library.writable:
        with pytest.raises(ValueError, match=r"^\w+: out must be writable, got a JAX array"):
            case.forward(library.to(case.x()), out=library.to(case.x()), **running(library, case))
        return
    x, dy, weight, bias = case.x(), case.dy(), case.weight(), case.bias()
    mean, rstd = case.exact_stats(x)
    statistics = [on(library, a) for a in (mean, rstd)]
    rooms = [np.full(case.shape, 99, F32), np.full(case.shape[::-1], 99, F32).T]
    if library.strided:
        rooms.append(np.full((*case.shape[:-1], case.shape[-1] * 3), 99, F32)[..., 1::3])
    for room in rooms:
        out = library.to(room)
        assert case.forward(*(on(library, a) for a in (x, weight, bias)), out=out, **running(library, case)) is out
        assert_forward(library.back(out), case.exact_forward(x, weight, bias))
        got = case.backward(library.to(dy), library.to(x), *statistics, library.to(weight), out=out)
        assert got[0] is out
        assert_gradients(back(library, got), case.exact_backward(dy, x, mean, rstd, weight))
    # In place.
    same = library.to(x.copy())
    assert case.forward(same, on(library, weight), on(library, bias), out=same, **running(library, case)) is same
    assert_forward(library.back(same), case.exact_forward(x, weight, bias))
    for place in (0, 1):
        given = [library.to(dy.copy()), library.to(x.copy())]
        got = case.backward(*given, *statistics, library.to(weight), out=given[place])
        assert got[0] is given[place]
        assert_gradients(back(library, got), case.exact_backward(dy, x, mean, rstd, weight))


@pytest.mark.parametrize("param", [F32, F64], ids=str)
def test_parameter_dtypes(library, all_on_device, param):
    for case in CASES:
        for dtype in DTYPES:
            if not suits(library, case, dtype):
                continue
            x, weight, bias = case.x(dtype), case.weight(param), case.bias(param)
            y = library.back(case.forward(*(on(library, a) for a in (x, weight, bias)), **running(library, case)))
            assert y.dtype == dtype
            assert_forward(y, case.exact_forward(x, weight, bias))
            stats = case.exact_stats(x)
            got = case.backward(*(on(library, a) for a in (case.dy(dtype), x, *stats, weight)))
            assert library.back(got[1]).dtype == param


@pytest.mark.parametrize("kind", ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_integers(library, all_on_device, kind):
    x = (np.arange(60).reshape(5, 12) % 7).astype(kind)
    y = library.back(nf.layer_norm(library.to(x)))
    assert y.dtype == F64
    np.testing.assert_allclose(y, nf.reference.layer_norm(x.astype(F64)), atol=1e-12)


def test_running_statistics(library, all_on_device):
    if not library.writable:
        with pytest.raises(ValueError, match=r"^batch_norm: running_mean must be writable"):
            nf.batch_norm(*(library.to(np.ones(s, F32)) for s in ((4, 6), 6, 6)), training=True)
        return
    x = batch((6, 4, 10)).x()
    for dtype in (F32, F64):
        for step in (1, 2) if library.strided else (1,):
            mean, var = np.zeros(4 * step, dtype)[::step], np.ones(4 * step, dtype)[::step]
            host_mean, host_var = mean.copy(), var.copy()
            given = library.to(mean), library.to(var)
            nf.batch_norm(library.to(x), *given, training=True, decay=0.75, running_ddof=0)
            channel = x.astype(F64).transpose(1, 0, 2).reshape(4, -1)
            np.testing.assert_allclose(library.back(given[0]), 0.75 * host_mean + 0.25 * channel.mean(1), rtol=1e-6)
            np.testing.assert_allclose(library.back(given[1]), 0.75 * host_var + 0.25 * channel.var(1), rtol=1e-6)


def test_nothing_to_do(library, all_on_device):
    """No reductions: empty results, zero parameter gradients; evaluation has statistics without cells."""
    x, stats = np.zeros((0, 8), F32), np.zeros((0, 1))
    y, mean, _ = back(library, nf.layer_norm(library.to(x), return_stats=True))
    assert y.shape == (0, 8)
    assert mean.shape == (0, 1)
    weight = np.ones(8, F32)
    got = nf.layer_norm_backward(*(library.to(a) for a in (x, x, stats, stats, weight)))
    got = back(library, got)
    assert got[0].shape == (0, 8)
    assert not got[1].any()
    assert not got[2].any()
    x = np.zeros((0, 3), F32)
    mean, rstd = back(library, nf.batch_norm(*(library.to(a) for a in (x, np.ones(3), np.ones(3))), return_stats=True))[
        1:
    ]
    np.testing.assert_allclose(mean, 1)
    np.testing.assert_allclose(rstd, 1 / np.sqrt(1 + 1e-5))
    with pytest.raises(ValueError, match=r"^layer_norm: x must have elements"):
        nf.layer_norm(library.to(np.zeros((3, 0), F32)))


# ---- memory and streams ----------------------------------------------------------------------------------------------


def test_memory_is_given_back(device):
    case = layer((3, 4, 5, 6), axis=(0, 2))
    before = device.live()
    x, weight = (Interface(a, stream=55) for a in (case.x(), case.weight()))
    y = case.forward(x, weight, return_stats=True)
    mean, rstd = (Interface(a) for a in case.exact_stats(case.x()))
    dx = case.backward(Interface(case.dy()), x, mean, rstd, weight)
    assert device.live() == before + 6  # y, mean, rstd; dx, dweight, dbias
    log = device.log()
    assert {s for what, s in log if what in KERNELS or what.startswith(("allocate", "release", "copy"))} == {55}
    assert ("wait_for 55", 100) in log  # results belong to the stream of DeviceArray
    del y, dx
    assert device.live() == before
    assert not any(what == "synchronize" for what, _ in device.log())


def test_failure_gives_memory_back(device):
    before = device.live()
    x = device.cuda.to_device(np.ones((4, 6), F32), None)
    with pytest.raises(TypeError, match=r"return_stats"):
        nf.layer_norm(x, return_stats=np.ones(3))
    device.fail(0)
    huge = Interface(np.ones(1, F32), shape=(1 << 20, 1 << 20), strides=(0, 0))
    with pytest.raises(MemoryError, match="cudaErrorMemoryAllocation"):
        nf.layer_norm(huge)
    del x
    assert device.live() == before


def test_streams(device):
    x = np.ones((4, 6), F32)
    for stream, used in ((None, 100), (1, 1), (2, 2), (12345, 12345)):
        nf.layer_norm(Interface(x, stream=stream))
        assert {s for what, s in device.log() if what in KERNELS} == {used}
    with pytest.raises(ValueError, match=r"^layer_norm: x .*stream 0"):
        nf.layer_norm(Interface(x, stream=0))
    # What is computed on another stream is waited for.
    nf.layer_norm(device.cuda.to_device(x, None), Interface(np.ones(6, F32), stream=9))
    log = device.log()
    assert ("wait_for 9", 100) in log
    assert log.index(("wait_for 9", 100)) < log.index(("rows_forward", 100))


def test_another_device(device, monkeypatch):
    """Everything happens there, and the current device is what it was; arrays on two devices are refused."""
    there = Interface(np.ones((4, 6), F32), device=1)
    y = nf.layer_norm(there)
    assert y.device == "cuda:1"
    log = device.log()
    assert ("rows_forward", 101) in log
    assert [what for what, _ in log if what.startswith("use_device")] == ["use_device 1", "use_device 0"]
    with pytest.raises(ValueError, match=r"^layer_norm: weight is on cuda:0 but x is on cuda:1; all arrays"):
        nf.layer_norm(there, Interface(np.ones(6, F32), device=0))
    assert [what for what, _ in device.log() if what.startswith("use_device")] == ["use_device 1", "use_device 0"]
    with pytest.raises(ValueError, match=r"^layer_norm: x must be on one of the 2 CUDA devices, got cuda:2"):
        nf.layer_norm(Interface(np.ones((4, 6), F32), device=2))
    del y


def test_dlpack(device):
    case = layer((5, 7))
    x = case.x()
    for versioned in (True, False):
        source = Exporter(x, versioned=versioned)
        y = nf.cuda.to_device(x)  # a DeviceArray, for its type
        assert type(device.cuda.layer_norm(source, None, None, -1, 1e-5, None, False)) is type(y)
        assert len(source.asked) == 2 - versioned
        got = device.cuda.layer_norm(source, None, None, -1, 1e-5, None, False)
        assert_forward(got.numpy(), case.exact_forward(x))
    assert ("set_mark", 100) in device.log()  # the capsule is kept until the kernel is done
    turned = x.T
    got = device.cuda.layer_norm(Exporter(turned), None, None, 0, 1e-5, None, False)
    assert same_bits(got.numpy().T, nf.layer_norm(nf.cuda.to_device(x)).numpy())
    locked = x.copy()
    locked.flags.writeable = False
    with pytest.raises(ValueError, match=r"^layer_norm: out must be writable"):
        device.cuda.layer_norm(source, None, None, -1, 1e-5, Exporter(locked), False)
    with pytest.raises(TypeError, match=r"^layer_norm: x must .*complex64"):
        device.cuda.layer_norm(Exporter(x.astype("c8")), None, None, -1, 1e-5, None, False)

    class NoCapsule(Exporter):
        def __dlpack__(self, **_):
            return "capsule"

    with pytest.raises(TypeError, match=r"^layer_norm: x has a __dlpack__ that gives no DLPack capsule"):
        device.cuda.layer_norm(NoCapsule(x), None, None, -1, 1e-5, None, False)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(test_errors.table()), ids=test_errors.describe)
def test_refusals_as_on_the_host(device, case):
    """The table of test_errors, every array on the device: the same types of error, naming the same argument."""
    function, changed, error, argument, pattern = case
    values = list(changed.values())
    if any(isinstance(v, list | tuple | str | np.generic) for k, v in changed.items() if k in ARRAYS):
        pytest.skip("not an array")
    dtypes = [v.dtype for v in values if isinstance(v, np.ndarray)]
    if any((d.kind in "OUSMV" and d != BF16) or d.name.startswith("float8") for d in dtypes):
        pytest.skip("no such arrays on a device")
    arguments = test_errors.base(function) | changed
    if not function.endswith("_backward"):
        arguments.pop("dy", None)
    if changed.get("x", 0) is None:
        pytest.skip("None is on no device")
    out = np.full(test_errors.X.shape, 55, F32)
    if "out" not in arguments and "x" not in changed and "needs" not in changed:
        arguments["out"] = out
    arguments = {k: device_array(v) if isinstance(v, np.ndarray) and k in ARRAYS else v for k, v in arguments.items()}
    device.log()
    with pytest.raises(error) as caught:
        getattr(nf, function)(**arguments)
    assert caught.type is error
    message = str(caught.value)
    assert re.match(rf"{function}: .*\b{argument}\b", message), message
    if not any(isinstance(v, np.ndarray) and v.dtype.byteorder == ">" for v in values):
        assert re.search(rf"{argument}\b.*({pattern})", message), message
    assert not [what for what, _ in device.log() if what in KERNELS | {"copy_cells"}]  # promise 7
    assert (out == 55).all()


ARRAYS = {"x", "dy", "weight", "bias", "mean", "rstd", "running_mean", "running_var", "out"}


def device_array(a):
    return Interface(a, read_only=not a.flags.writeable)


def test_good_arguments_pass(device):
    """Negative control of the above."""
    for function in test_errors.FORWARD + test_errors.BACKWARD:
        arguments = test_errors.base(function)
        getattr(nf, function)(**{k: device_array(v) if k in ARRAYS else v for k, v in arguments.items()})


def test_axis_error(device):
    with pytest.raises(AxisError, match=r"^layer_norm: axis 2 is out of bounds"):
        nf.layer_norm(device_array(np.ones((2, 3), F32)), axis=2)


@pytest.mark.parametrize("function", test_errors.FORWARD + test_errors.BACKWARD)
def test_mixing_host_and_device(device, function):
    """Each array in turn is on the other side."""
    base = test_errors.base(function) | {"weight": np.ones(test_errors.n(function), F32), "out": test_errors.X32.copy()}
    if not function.endswith("_backward"):
        base.pop("dy", None)
    names = [k for k in base if k in ARRAYS]
    for odd in names:
        for here in (False, True):  # where the odd one is not: x on the host, x on the device
            arguments = {k: device_array(v) if k in names and (k == odd) != here else v for k, v in base.items()}
            x_is_there = isinstance(arguments["x"], Interface)
            message = (
                rf"{function}: \w+ is a NumPy array but x is on cuda:0; copy it there, for example with "
                r"normfast.cuda.to_device\(\w+\)"
                if x_is_there
                else rf"{function}: \w+ is on a CUDA device, but x is on the host; copy it to the host first"
            )
            with pytest.raises(TypeError, match=f"^{message}") as caught:
                getattr(nf, function)(**arguments)
            assert odd == "x" or str(caught.value).startswith(f"{function}: {odd} ")


def test_the_way_to_the_device(library, all_on_device):
    """The message of a mixture names the function of the caller's own library."""
    x = library.to(np.ones((4, 6), F32))
    with pytest.raises(TypeError) as caught:
        nf.layer_norm(x, np.ones(6, F32))
    assert str(caught.value).endswith(library.way)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": object()}, TypeError, "x must have no mask"),
        ({"typestr": ">f4"}, TypeError, "x must be in native byte order"),
        ({"typestr": "<c8"}, TypeError, "x must be of a floating dtype .*got complex64"),
        ({"typestr": "|V2"}, TypeError, "x must be of a floating dtype .*got "),
        ({"typestr": "?"}, TypeError, "x has a __cuda_array_interface__ without a typestr"),
        ({"typestr": None}, TypeError, "x has a __cuda_array_interface__ without a typestr"),
        ({"shape": None}, TypeError, "x has a __cuda_array_interface__ without a shape"),
        ({"shape": (4, 6.5)}, TypeError, "x has .* whose shape is not made of integers"),
        ({"shape": (4, -6)}, ValueError, "x must have no negative length"),
        ({"strides": (4,)}, TypeError, "x has .* with shape .* and strides"),
        ({"strides": (24, 3)}, ValueError, "x must be aligned"),
        ({"data": (0, False)}, ValueError, "x has no memory"),
        ({"data": None}, TypeError, "x has .* without an address"),
        ({"shape": (1,) * 65, "strides": None}, TypeError, "x has .* whose shape is no tuple of at most 64"),
        ({"stream": "fast"}, TypeError, "x|an integer is required|must be"),
    ],
)
def test_bad_interfaces(device, changes, error, message):
    x = Interface(np.ones((4, 6), F32), **changes)
    with pytest.raises(error, match=message):
        nf.layer_norm(x)


def test_torch_tensors_that_cannot_be_taken(device, all_on_device, monkeypatch):
    torch = pytest.importorskip("torch")
    stream = types.SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    x = torch.ones(4, 6, requires_grad=True)
    with pytest.raises(TypeError, match=r"^layer_norm: x must not require a gradient.*pass x\.detach\(\)"):
        nf.layer_norm(x)
    assert nf.layer_norm(x.detach()).shape == (4, 6)
    with pytest.raises(TypeError, match=r"^layer_norm: weight must not require a gradient"):
        nf.layer_norm(x.detach(), torch.ones(6, requires_grad=True))
    with pytest.raises(TypeError, match=r"^layer_norm: x must hold its values"):
        nf.layer_norm(torch.ones(4, 6, dtype=torch.complex64).conj().imag)
    with pytest.raises(TypeError, match=r"^layer_norm: x must be of a floating dtype .*got complex64"):
        nf.layer_norm(torch.ones(4, 6, dtype=torch.complex64))


def test_no_device(device):
    device.fail(35)
    message = "no CUDA device: cudaErrorOfTheTest: as the test ordered"
    for name, call in {
        "layer_norm": lambda: nf.layer_norm(Interface(np.ones((4, 6), F32))),
        "batch_norm_backward": lambda: nf.batch_norm_backward(*[Interface(np.ones((4, 6), F32))] * 4),
        "to_device": lambda: nf.cuda.to_device(np.ones(3)),
        "synchronize": nf.cuda.synchronize,
    }.items():
        with pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value) == f"{name}: {message}"
    assert device.cuda.config()["reason"] == "cudaErrorOfTheTest: as the test ordered"
    assert device.cuda.config()["devices"] == []


def test_config(device):
    config = nf.show_config("dicts")["cuda"]
    assert config["built"]
    assert config["available"]
    assert config["architectures"] == ["host", "memory"]
    assert config["devices"][1] == {"name": "host memory", "compute_capability": "1.0"}
    assert config["reason"] is None


# ---- DeviceArray -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(bool), np.dtype("i4"), np.dtype("u8")], ids=str)
def test_device_array(device, dtype):
    a = (np.arange(24).reshape(2, 3, 4) % 5).astype(dtype)
    for x in (a, a.transpose(2, 0, 1), a[:, ::2], a[0, 0, 0], a[:, :0], a.astype(dtype.newbyteorder(">"))):
        y = device.cuda.to_device(x, None)
        native = np.asarray(x, dtype)
        assert (y.shape, y.ndim, y.size, y.nbytes) == (native.shape, native.ndim, native.size, native.nbytes)
        assert y.dtype == dtype
        assert y.device == "cuda:0"
        assert repr(y) == f"DeviceArray(shape={native.shape}, dtype={dtype}, device='cuda:0')"
        host = y.numpy()
        assert host.dtype == dtype
        assert (host == native).all()
        if native.size:
            assert y.strides == host.strides
    x = device.cuda.to_device(a, None)
    interface = x.__cuda_array_interface__
    assert interface["version"] == 3
    assert interface["stream"] == 100
    assert x.__dlpack_device__() == (1, 0)
    if dtype != BF16:
        assert (np.from_dlpack(x) == a).all()
        assert interface["typestr"] == dtype.str
    for keywords in ({}, {"max_version": (1, 0)}, {"max_version": (0, 8)}, {"stream": 5}, {"stream": -1}):
        capsule = x.__dlpack__(**keywords)
        assert ("versioned" in repr(capsule)) == (keywords.get("max_version") == (1, 0))
    with pytest.raises(BufferError, match="copy"):
        x.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="dl_device"):
        x.__dlpack__(dl_device=(1, 1))


def test_exported_memory_lives_on(device):
    x = device.cuda.to_device(np.arange(6.0), None)
    view = np.from_dlpack(x)
    before = device.live()
    del x
    assert device.live() == before
    assert (view == np.arange(6)).all()
    del view
    assert device.live() == before - 1
    assert ("synchronize", 0) in device.log()  # nobody knows what still runs on shared memory


def test_to_device_refuses(device):
    for bad in (np.ones(3, complex), np.ones(3, object), "text", np.ones(3, "M8[s]")):
        with pytest.raises(TypeError, match=r"^to_device: x must be of a floating dtype"):
            device.cuda.to_device(bad, None)
    with pytest.raises(TypeError, match=r"^to_device: x must be an array on the host"):
        device.cuda.to_device(Interface(np.ones(3)), None)
    with pytest.raises(ValueError, match=r"^to_device: device must be one of the 2"):
        device.cuda.to_device(np.ones(3), 2)
    with pytest.raises(TypeError, match=r"^to_device: device must be an integer"):
        device.cuda.to_device(np.ones(3), "cuda:0")
    assert device.cuda.to_device(np.ones(3), 1).device == "cuda:1"
    with pytest.raises(TypeError):
        device.cuda.DeviceArray()
