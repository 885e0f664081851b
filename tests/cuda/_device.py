# SPDX-License-Identifier: BSD-3-Clause

"""What the tests on a real device share: is there one, and the libraries of arrays on it.

With NORMFAST_CUDA_REHEARSAL=1 the host build of the bindings stands in for the device, to try the tests themselves.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache

import ml_dtypes
import numpy as np
import pytest

import normfast as nf
from _cases import batch, group, instance, layer, rms

BF16 = np.dtype(ml_dtypes.bfloat16)
REHEARSAL = bool(os.environ.get("NORMFAST_CUDA_REHEARSAL"))
OPS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm")
# JAX would take most of the device's memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

CASES = [
    layer((6, 33)),
    layer((3, 5, 8), axis=1),
    layer((3, 4, 5, 6), axis=(0, 2)),
    rms((6, 33)),
    rms((3, 5, 8), axis=(0, 2)),
    group((3, 6, 10), 2),
    group((3, 10, 6), 2, channel_axis=-1),
    instance((3, 4, 10)),
    instance((3, 10, 4), channel_axis=-1),
    batch((6, 4, 10)),
    batch((6, 10, 4), channel_axis=-1),
    batch((6, 4, 10), training=False),
]


def _rehearse():
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    from host import build_bindings

    if "host._cuda" in sys.modules:
        return
    module = sys.modules.get("normfast._cuda")
    if module is None or "host" not in module.config()["architectures"]:  # else it is the one that is installed
        built = Path(os.environ["NORMFAST_CUDA_REHEARSAL"])  # or 1, and it is built
        if built.suffix != ".so":
            cache = f"bindings-{sys.implementation.cache_tag}"
            built = build_bindings.build(Path(__file__).parents[2] / "build" / cache)
        spec = spec_from_file_location("host._cuda", built)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    sys.modules["host._cuda"] = sys.modules["normfast._cuda"] = module
    for op in OPS:
        importlib.import_module(f"normfast.{op}")._core = module


def missing():
    """Why there is no device to test on, or None."""
    if REHEARSAL:
        _rehearse()
        return None
    cuda = nf.show_config("dicts")["cuda"]
    return None if cuda["available"] else f"no CUDA device: {cuda['reason']}"


class Own:
    """normfast.cuda.DeviceArray: a NumPy user's."""

    permuted = bfloat16 = writable = True  # permuted: keeps the memory order of a transposed array
    strided = False

    def __init__(self):
        self.type = nf.cuda.DeviceArray

    def put(self, a):
        return nf.cuda.to_device(a)

    def get(self, result):
        assert isinstance(result, self.type)
        return result.numpy()

    def synchronize(self):
        nf.cuda.synchronize()


class Cupy(Own):
    strided = True

    def __init__(self):
        import cupy

        self.cupy, self.type = cupy, cupy.ndarray
        try:
            self.get(self.put(np.ones(3, BF16)))
        except Exception:  # only later versions have it
            self.bfloat16 = False

    def put(self, a):
        order = np.argsort([-abs(s) for s in a.strides], kind="stable")
        base = np.ascontiguousarray(a.transpose(order))
        there = self.cupy.asarray(base.view(np.uint16)).view(BF16) if a.dtype == BF16 else self.cupy.asarray(base)
        return there.transpose(tuple(int(i) for i in np.argsort(order)))

    def get(self, result):
        assert isinstance(result, self.type)
        if result.dtype == BF16:
            return self._ordered(result.view(np.uint16)).view(BF16)
        return self._ordered(result)

    def _ordered(self, result):
        """A copy in the memory order that the array has on the device, which `get` alone does not always keep."""
        order = np.argsort([-abs(s) for s in result.strides], kind="stable")
        back = tuple(int(i) for i in np.argsort(order))
        return result.transpose(tuple(int(i) for i in order)).get(order="C").transpose(back)


class Torch(Own):
    strided = True

    def __init__(self):
        import torch

        self.torch, self.type = torch, torch.Tensor
        self.device = "cpu" if REHEARSAL else "cuda"
        if REHEARSAL:
            import types

            torch.cuda.current_stream = lambda device=None: types.SimpleNamespace(cuda_stream=77)
        elif not torch.cuda.is_available():
            raise RuntimeError("this build of PyTorch sees no CUDA device")

    def put(self, a):
        if a.dtype == BF16:
            return self.torch.from_numpy(a.view(np.int16)).to(self.device).view(self.torch.bfloat16)
        return self.torch.from_numpy(a).to(self.device)

    def get(self, result):
        assert isinstance(result, self.type)
        assert str(result.device).startswith(self.device)
        result = result.cpu()
        if result.dtype == self.torch.bfloat16:
            return result.view(self.torch.int16).numpy().view(BF16)
        return result.numpy()


class Jax(Own):
    permuted = writable = False

    def __init__(self):
        import jax

        jax.config.update("jax_enable_x64", True)
        platforms = {device.platform for device in jax.devices()}
        if not REHEARSAL and not platforms & {"gpu", "cuda"}:
            raise RuntimeError(f"this build of JAX sees no CUDA device, only {', '.join(platforms)}")
        self.jax, self.type = jax, jax.Array

    def put(self, a):
        return self.jax.device_put(np.ascontiguousarray(a))

    def get(self, result):
        assert isinstance(result, self.type)
        return np.asarray(result)


class Numba(Own):
    permuted = bfloat16 = False

    def __init__(self):
        from numba import cuda

        if not cuda.is_available():
            raise RuntimeError("Numba sees no CUDA device")
        self.cuda = cuda

    def put(self, a):
        return self.cuda.to_device(np.ascontiguousarray(a))

    def get(self, result):
        assert self.cuda.is_cuda_array(result)
        assert not isinstance(result, nf.cuda.DeviceArray)
        return result.copy_to_host()


LIBRARIES = {"own": Own, "torch": Torch, "cupy": Cupy, "jax": Jax, "numba": Numba}
_opened = {}


def open_library(name):
    """The library, opened once; skips where it is not installed or sees no device."""
    if name not in _opened:
        try:
            _opened[name] = LIBRARIES[name]()
        except Exception as error:
            _opened[name] = f"{name}: {type(error).__name__}: {error}".splitlines()[0]
    if isinstance(_opened[name], str):
        pytest.skip(_opened[name])
    return _opened[name]


def stop_if_lost():
    """A kernel that broke the context has broken all tests to come, which would say nothing."""
    try:
        nf.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the device is lost: {error}", returncode=3)


def ulps(dtype):
    """Promise 2 on a device: within 5 ulp, for float64 within 16 as on the host. The stand-in adds up naively."""
    return (500 if REHEARSAL else 16) if np.dtype(dtype) == np.float64 else 5


def put(lib, *arrays):
    return [None if a is None else lib.put(a) for a in arrays]


def get(lib, values):
    return tuple(None if value is None else lib.get(value) for value in values)


def suits(lib, case, dtype):
    return (lib.bfloat16 or dtype != BF16) and (lib.permuted or case.permutation is None)


def running(lib, case):
    """What a call of this case needs besides x, weight and bias."""
    return {} if case.training else {"running": tuple(put(lib, *case.running()))}


@cache
def forward_problem(case, dtype, params=True):
    """x, weight, bias, the exact y, the exact statistics."""
    x = case.x(dtype)
    weight, bias = (case.weight(dtype), case.bias(dtype)) if params else (None, None)
    return x, weight, bias, case.exact_forward(x, weight, bias), case.exact_forward(x)


@cache
def backward_problem(case, dtype):
    """dy, x, mean, rstd, weight, and the exact gradients."""
    arrays = case.dy(dtype), case.x(dtype), *case.exact_stats(case.x(dtype)), case.weight(dtype)
    return arrays, case.exact_backward(*arrays)
