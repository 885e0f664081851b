# SPDX-License-Identifier: BSD-3-Clause

"""Streams, graphs, threads and devices: work is enqueued where the caller works, and nobody waits for it."""

from __future__ import annotations

import threading

import _device
import numpy as np
import pytest
from _device import CASES, forward_problem, get, put, running, ulps

import normfast as nf
from _cases import batch, group, layer, rms
from _checks import F16, F32, assert_forward, assert_gradients, assert_same_bits

if (reason := _device.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)
if _device.REHEARSAL:
    pytest.skip("the host has no streams", allow_module_level=True)

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

LONG_WAIT = 400_000_000  # cycles: some 0.2 s
MORE = [*CASES, layer((300, 4096)), rms((3, 30_001)), group((2, 64, 32, 32), 32), batch((16, 64, 32, 32))]


@pytest.fixture(autouse=True)
def alive():
    yield
    _device.stop_if_lost()


@pytest.fixture
def torch():
    return _device.open_library("torch").torch


@pytest.fixture
def cupy():
    return _device.open_library("cupy").cupy


def call(case, x, weight, bias, dy, kw):
    """Everything that a training step calls."""
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True, **kw)
    return y, mean, rstd, *case.backward(dy, x, mean, rstd, weight)


def problem(lib, case, seed=0):
    arrays = case.x(F32, seed), case.weight(F32), case.bias(F32), case.dy(F32, seed + 1)
    return put(lib, *arrays)


@pytest.mark.parametrize("case", MORE, ids=str)
def test_torch_stream(torch, case):
    """On the current stream, behind what is there, and without waiting for it."""
    lib = _device.open_library("torch")
    x, weight, bias, dy = problem(lib, case)
    kw = running(lib, case)
    want = get(lib, call(case, x, weight, bias, dy, kw))  # loads the kernels too, which may wait
    late = torch.zeros_like(x)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        call(case, late, weight, bias, dy, kw)  # fills this stream's pool of memory
        side.synchronize()
        torch.cuda._sleep(LONG_WAIT)
        late.copy_(x)
        results = call(case, late, weight, bias, dy, kw)
        waited = side.query()
    side.synchronize()
    assert not waited, "the call returned only when the stream was done"
    assert_same_bits(get(lib, results), want)


@pytest.mark.parametrize("case", MORE, ids=str)
def test_cupy_stream(torch, cupy, case):
    lib = _device.open_library("cupy")
    x, weight, bias, dy = problem(lib, case)
    kw = running(lib, case)
    want = get(lib, call(case, x, weight, bias, dy, kw))
    late = cupy.zeros_like(x)
    side = torch.cuda.Stream()
    cupy.cuda.Device().synchronize()
    with cupy.cuda.ExternalStream(side.cuda_stream):
        call(case, late, weight, bias, dy, kw)
        side.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG_WAIT)
        cupy.copyto(late, x)
        results = call(case, late, weight, bias, dy, kw)
        waited = side.query()
        side.synchronize()
    assert not waited, "the call returned only when the stream was done"
    assert_same_bits(get(lib, results), want)


def test_arrays_of_another_library_are_waited_for(torch):
    """x of ours, weight of PyTorch on a stream that is still writing it."""
    case = layer((50, 768))
    x, weight, _, want, _ = forward_problem(case, F32)
    own, lib = _device.open_library("own"), _device.open_library("torch")
    given, late, x_there = lib.put(weight), lib.put(np.zeros_like(weight)), own.put(x)
    bias = own.put(case.bias())
    own.get(case.forward(x_there, late, bias))
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG_WAIT)
        late.copy_(given)
        y = case.forward(x_there, late, bias)
    assert_forward(own.get(y), want, ulps(F32))


@pytest.mark.parametrize("case", MORE, ids=str)
def test_torch_graph(torch, case):
    lib = _device.open_library("torch")
    x, weight, bias, dy = problem(lib, case)
    kw = running(lib, case)
    other = problem(lib, case, seed=5)
    want = get(lib, call(case, other[0], weight, bias, other[3], kw))
    out = torch.empty_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(case, x, weight, bias, dy, kw)
        case.forward(x, weight, bias, out=out, **kw)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(case, x, weight, bias, dy, kw)
        case.forward(x, weight, bias, out=out, **kw)
    x.copy_(other[0])
    dy.copy_(other[3])
    for _ in range(3):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(get(lib, results), want)
        assert_same_bits(lib.get(out), want[0])


@pytest.mark.parametrize("case", MORE, ids=str)
def test_cupy_graph(cupy, case):
    lib = _device.open_library("cupy")
    x, weight, bias, dy = problem(lib, case)
    kw = running(lib, case)
    other = problem(lib, case, seed=5)
    want = get(lib, call(case, other[0], weight, bias, other[3], kw))
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        call(case, x, weight, bias, dy, kw)
        stream.synchronize()
        stream.begin_capture()
        try:
            results = call(case, x, weight, bias, dy, kw)
        finally:
            graph = stream.end_capture()
        cupy.copyto(x, other[0])
        cupy.copyto(dy, other[3])
        for _ in range(3):
            graph.launch(stream)
            stream.synchronize()
            assert_same_bits(get(lib, results), want)


@pytest.mark.parametrize("name", ["own", "torch", "cupy"])
def test_threads(name):
    """Several threads at once, on the same arrays."""
    lib = _device.open_library(name)
    cases = [layer((700, 1031)), group((4, 32, 33, 33), 8), batch((16, 24, 33, 33)), layer((1031, 40), axis=0)]
    for case in cases:
        arrays = problem(lib, case)
        kw = running(lib, case)
        want = get(lib, call(case, *arrays, kw))
        failures = []

        def work(case=case, arrays=arrays, kw=kw, want=want, failures=failures):
            try:
                for _ in range(20):
                    assert_same_bits(get(lib, call(case, *arrays, kw)), want)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures, failures[0]


def test_memory_may_be_reused_at_once():
    """Inputs and results dropped while the work is still enqueued: nobody gets their memory too early."""
    for name in ("own", "torch", "cupy", "jax"):
        try:
            lib = _device.open_library(name)
        except pytest.skip.Exception:
            continue
        case = layer((2000, 1024))
        x, weight, bias, want, _ = forward_problem(case, F32)
        arrays = put(lib, x, weight, bias)
        results = [lib.get(case.forward(case.forward(*arrays), *arrays[1:])) for _ in range(3)]
        once = lib.get(case.forward(*arrays))
        assert_forward(once, want, ulps(F32))
        for result in results:
            assert_same_bits(result, lib.get(case.forward(lib.put(once), *arrays[1:])))


def test_only_dlpack(torch):
    """A library that offers nothing but DLPack: the results are DeviceArrays."""

    class Exporter:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **keywords):
            return self.tensor.__dlpack__(**keywords)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    case = layer((50, 768))
    for dtype in (F32, F16):
        arrays = case.x(dtype), case.weight(dtype), case.bias(dtype)
        given = [Exporter(a) for a in put(_device.open_library("torch"), *arrays)]
        y = nf.layer_norm(*given)
        assert isinstance(y, nf.cuda.DeviceArray)
        assert_forward(y.numpy(), case.exact_forward(*arrays), ulps(dtype))


def test_protocols_out(torch):
    """Other libraries take a DeviceArray, without a copy."""
    own = _device.open_library("own")
    case = layer((50, 768))
    x, weight, bias, want, _ = forward_problem(case, F32)
    y = case.forward(*put(own, x, weight, bias))
    assert_forward(torch.from_dlpack(y).cpu().numpy(), want, ulps(F32))
    assert_forward(torch.as_tensor(y, device="cuda").cpu().numpy(), want, ulps(F32))


def test_second_device(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device only")
    for case in (layer((50, 768)), batch((6, 11, 35)), group((2, 12, 9), 3)):
        arrays = case.x(), case.weight(), case.bias(), case.dy()
        x, weight, bias, dy = (torch.from_numpy(a).to("cuda:1") for a in arrays)
        y, mean, rstd, *gradients = call(case, x, weight, bias, dy, {})
        assert {str(r.device) for r in (y, mean, rstd, *gradients)} == {"cuda:1"}
        assert torch.cuda.current_device() == 0
        assert_forward(y.cpu().numpy(), case.exact_forward(*arrays[:3]), ulps(F32))
        want = case.exact_backward(arrays[3], arrays[0], *case.exact_stats(arrays[0]), arrays[1])
        assert_gradients(tuple(g.cpu().numpy() for g in gradients), want)
        with pytest.raises(ValueError, match="all arrays must be on one device"):
            case.forward(x, weight.to("cuda:0"))
