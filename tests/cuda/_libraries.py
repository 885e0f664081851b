# SPDX-License-Identifier: BSD-3-Clause

"""Libraries of arrays for the host build of `normfast._cuda`, whose device is the host's memory.

Each has `to`, from a NumPy array (sharing its memory where the library can), and `back`. Real ones where they are
installed (PyTorch and JAX, on the CPU); stand-ins with the same manners for the others.
"""

from __future__ import annotations

import sys
import types

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
STREAM = 77  # the current stream of every stand-in


class Interface:
    """Only `__cuda_array_interface__`, as of a library nobody has heard of."""

    def __init__(self, a, *, stream=None, device=None, read_only=False, **changes):
        self.a, self.stream, self.read_only, self.changes = a, stream, read_only, changes
        if device is not None:
            self.__class__ = InterfaceWithDevice
            self.device = device

    @property
    def dtype(self):
        return self.a.dtype

    @property
    def shape(self):
        return self.a.shape

    @property
    def __cuda_array_interface__(self):
        interface = {
            "shape": self.a.shape,
            "typestr": self.a.dtype.str,
            "data": (self.a.__array_interface__["data"][0], self.read_only),
            "strides": self.a.strides,
            "version": 3,
            "stream": self.stream,
        }
        return interface | self.changes


class InterfaceWithDevice(Interface):
    def __dlpack_device__(self):
        return (1, self.device)


class Exporter:
    """Only DLPack: versioned, or as before 1.0, when `__dlpack__` did not know max_version."""

    def __init__(self, a, *, versioned=True):
        self.a, self.versioned, self.asked = a, versioned, []

    def __dlpack__(self, **keywords):
        self.asked.append(keywords)
        if not self.versioned and "max_version" in keywords:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.a.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return (1, 0)


def fake_cupy():
    """A module with the manners of CuPy, over NumPy."""
    cupy = types.ModuleType("cupy")

    class ndarray(Interface):
        def __init__(self, a):
            super().__init__(a, stream=STREAM)

        @property
        def data(self):
            return types.SimpleNamespace(ptr=self.a.__array_interface__["data"][0])

        def __dlpack_device__(self):
            return (1, 0)

        def transpose(self, axes):
            return ndarray(self.a.transpose(axes))

    class Device:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            cupy.entered.append(self.number)

        def __exit__(self, *_):
            cupy.entered.append(-1)

    cupy.entered = []
    cupy.ndarray = ndarray
    cupy.empty = lambda shape, dtype: ndarray(np.full(shape, 99, dtype))
    cupy.cuda = types.SimpleNamespace(
        get_current_stream=lambda: types.SimpleNamespace(ptr=STREAM),
        Device=Device,
    )
    return cupy


def fake_numba():
    """What of Numba is used, over NumPy."""
    numba, cuda = types.ModuleType("numba"), types.ModuleType("numba.cuda")
    devicearray = types.ModuleType("numba.cuda.cudadrv.devicearray")

    class DeviceNDArrayBase(Interface):
        pass

    def device_array(shape, dtype, strides):
        room = np.full(int(np.prod(shape)), 99, dtype)
        return DeviceNDArrayBase(np.lib.stride_tricks.as_strided(room, shape, strides))

    devicearray.DeviceNDArrayBase = DeviceNDArrayBase
    cuda.device_array = device_array
    numba.cuda = cuda
    return {"numba": numba, "numba.cuda": cuda, "numba.cuda.cudadrv.devicearray": devicearray}


class Own:
    """normfast.cuda.DeviceArray"""

    permuted = True  # keeps the memory order of an array
    strided = False
    bfloat16 = writable = True
    way = "normfast.cuda.to_device(weight)"
    stream = 100  # that of device 0 in the host build

    def __init__(self, cuda):
        self.cuda, self.type = cuda, cuda.DeviceArray

    def to(self, a):
        return self.cuda.to_device(a, None)

    def back(self, result):
        assert type(result) is self.type
        return result.numpy()


class Other(Own):
    """A library that is not known: the results are ours."""

    strided = True

    def to(self, a):
        return Interface(a)

    def back(self, result):
        return result.a if isinstance(result, Interface) else super().back(result)


class Cupy:
    permuted = strided = bfloat16 = writable = True
    way = "cupy.asarray(weight)"
    stream = STREAM

    def __init__(self, _, monkeypatch):
        cupy = fake_cupy()
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        self.type = cupy.ndarray

    def to(self, a):
        return self.type(a)

    def back(self, result):
        assert type(result) is self.type
        return result.a


class Numba(Cupy):
    bfloat16 = False
    way = "numba.cuda.to_device(weight)"
    stream = 100

    def __init__(self, _, monkeypatch):
        modules = fake_numba()
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        self.type = modules["numba.cuda.cudadrv.devicearray"].DeviceNDArrayBase


class Torch:
    permuted = strided = bfloat16 = writable = True
    way = 'torch.as_tensor(weight, device="cuda:0")'
    stream = STREAM

    def __init__(self, _, monkeypatch):
        import torch

        self.torch, self.type = torch, torch.Tensor
        stream = types.SimpleNamespace(cuda_stream=STREAM)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    def to(self, a):
        if a.dtype == BF16:
            return self.torch.from_numpy(a.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(a)

    def back(self, result):
        assert type(result) is self.type
        if result.dtype == self.torch.bfloat16:
            return result.view(self.torch.int16).numpy().view(BF16)
        return result.numpy()


class Jax:
    permuted = strided = writable = False
    bfloat16 = True
    way = "jax.device_put(weight, x.device)"
    stream = 100

    def __init__(self, _, monkeypatch):
        import jax

        before = jax.config.jax_enable_x64
        jax.config.update("jax_enable_x64", True)
        monkeypatch.callback(lambda: jax.config.update("jax_enable_x64", before))
        self.jax, self.type = jax, jax.Array

    def to(self, a):
        return self.jax.numpy.asarray(a)

    def back(self, result):
        assert isinstance(result, self.type)
        return np.asarray(result)


LIBRARIES = {"own": Own, "other": Other, "cupy": Cupy, "numba": Numba, "torch": Torch, "jax": Jax}
