# SPDX-License-Identifier: BSD-3-Clause

"""The host build of the bindings, in place of `normfast._cuda`."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import sys
from pathlib import Path

import pytest
from _libraries import LIBRARIES
from host import build_bindings

OPS = ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"]


class HostDevice:
    """The module, and the log of what it asked of its device."""

    def __init__(self, path):
        # Another name than that of the real module, or pybind11 would hand out that one.
        spec = importlib.util.spec_from_file_location("host._cuda", path)
        self.cuda = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.cuda)
        self.dll = ctypes.CDLL(str(path))
        self.dll.nf_test_log.restype = ctypes.c_char_p

    def log(self):
        """Pairs of what was done and on which stream, since the last time."""
        lines = self.dll.nf_test_log().decode().splitlines()
        self.dll.nf_test_clear_log()
        return [(line.rpartition(" ")[0], int(line.rpartition(" ")[2])) for line in lines]

    def live(self):
        """How many blocks of memory are in use."""
        gc.collect()
        return self.dll.nf_test_live()

    def fail(self, error):
        self.dll.nf_test_fail(error)


@pytest.fixture(scope="session")
def built():
    if build_bindings.compiler() is None:
        pytest.skip("needs a C++ compiler")
    pytest.importorskip("pybind11")
    folder = Path(__file__).parents[2] / "build" / f"bindings-{sys.implementation.cache_tag}"
    return HostDevice(build_bindings.build(folder))


@pytest.fixture
def device(built, monkeypatch):
    """Public functions find the host build when an array says that it is on a device."""
    monkeypatch.setitem(sys.modules, "normfast._cuda", built.cuda)
    built.log()
    yield built
    built.fail(0)


class Patches:
    def __init__(self, monkeypatch):
        self.setitem, self.setattr, self.ends = monkeypatch.setitem, monkeypatch.setattr, []
        self.callback = self.ends.append


@pytest.fixture(params=LIBRARIES)
def library(request, device, monkeypatch):
    """A library of arrays. PyTorch and JAX arrays on the CPU are not sent to a device, so all calls are."""
    kind = LIBRARIES[request.param]
    if request.param in ("torch", "jax"):
        pytest.importorskip(request.param)
    patches = Patches(monkeypatch)
    if request.param in ("own", "other"):
        yield kind(device.cuda)
    else:
        yield kind(device.cuda, patches)
    for end in patches.ends:
        end()


@pytest.fixture
def all_on_device(device, monkeypatch):
    """The public functions call the host build whatever their arrays say."""
    for op in OPS:
        monkeypatch.setattr(sys.modules[f"normfast.{op}"], "_core", device.cuda)
