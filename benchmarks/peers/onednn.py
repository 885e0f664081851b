"""oneDNN through a small driver (``onednn_driver.cpp``), built on demand against the package ``onednn-devel``.

That package runs its CPU primitives through a SYCL queue: a submission costs tens of microseconds, which small cells
show. Several calls are therefore submitted before one wait. Its number of threads follows the CPUs that the process may
use when the runtime starts, so it starts with as many CPUs as threads asked for, and the limit is lifted afterwards.
"""

from __future__ import annotations

import ctypes
import os
from importlib import metadata
from pathlib import Path
from weakref import finalize

import numpy as np

from .. import native
from ..problem import Problem, aligned
from .base import Contender, Lacks, Peer


def _prefix() -> Path | None:
    """Where the package put ``include`` and ``lib``."""
    try:
        files = metadata.files("onednn-devel") or []
    except metadata.PackageNotFoundError:
        return None
    header = next((f for f in files if f.as_posix().endswith("include/oneapi/dnnl/dnnl.h")), None)
    return Path(header.locate()).resolve().parents[3] if header else None


class OneDnn(Peer):
    name = "onednn"

    def environment(self, threads: int) -> dict[str, str]:
        prefix = _prefix()
        icd = prefix / "lib" / "libintelocl.so" if prefix else None
        # The CPU appears to SYCL as an OpenCL device, which the loader finds by this variable.
        return {"OCL_ICD_FILENAMES": str(icd)} if icd and icd.exists() else {}

    def open(self, threads: int) -> str:
        prefix = _prefix()
        if prefix is None:
            raise Lacks("not installed")
        lib = prefix / "lib"
        flags = (f"-I{prefix / 'include'}", "-std=c++17", f"-L{lib}", "-ldnnl", "-Wl,--disable-new-dtags")
        try:
            self.driver = native.build(
                "peers/onednn_driver.cpp", native.CXX, (*flags, f"-Wl,-rpath,{lib}", f"-Wl,-rpath-link,{lib}")
            )
        except (native.CannotBuild, OSError) as error:
            raise Lacks(f"driver: {error}") from error
        for name in ("driver_implementation", "driver_version"):
            getattr(self.driver, name).restype = ctypes.c_char_p
        self._start(threads)
        return self.driver.driver_version().decode()

    def _start(self, threads: int) -> None:
        if not hasattr(os, "sched_setaffinity"):
            return
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, sorted(allowed)[:threads])
        try:
            x = np.ones((64, 64), np.float32)
            w = np.ones(64, np.float32)
            run = _Run(self.driver, "layer_norm", "float32", (64, 64), False, 0, 1e-5)
            run.point(src=x, dst=np.empty_like(x), scale=w, shift=w)
            run(1)
        finally:
            for task in os.listdir("/proc/self/task"):  # threads that started meanwhile took the limit over
                try:
                    os.sched_setaffinity(int(task), allowed)
                except ProcessLookupError:
                    continue

    def prepare(self, problem: Problem, recycled: bool) -> Contender:
        case, x = problem.case, problem.x
        if case.dtype == "float64":
            raise Lacks("no float64")
        if case.per_row and case.axis != -1:
            raise Lacks("only the last axis")
        if case.op == "rms_norm_backward":
            # Seen in 3.13.2: dx is that of layer norm, the mean of dy*weight is subtracted.
            raise Lacks("its RMS norm backward computes another gradient")
        if not case.parameter_gradients:
            raise Lacks("the driver asks for all gradients")
        dims = (x.shape[0], x.shape[-1], *x.shape[1:-1]) if case.channels_last else x.shape
        groups = case.groups or (case.channels if case.family == "instance_norm" else 0)
        run = _Run(self.driver, case.op, case.dtype, dims, case.channels_last, groups, problem.eps)
        if case.backward:
            return _backward(run, problem, recycled)
        weight, bias = problem.weight.astype(np.float32), problem.bias.astype(np.float32)
        run.point(src=x, scale=weight, shift=bias, mean=problem.running_mean, variance=problem.running_var)
        return _contender(run, problem, recycled, "dst", [])


class _Run:
    """A primitive and the arrays it points at."""

    def __init__(self, driver, op, dtype, dims, channels_last, groups, eps) -> None:
        self._driver, self._arrays = driver, {}
        self._message = ctypes.create_string_buffer(512)
        self._handle = ctypes.c_void_p()
        shape = (ctypes.c_int64 * len(dims))(*dims)
        failed = driver.driver_create(
            op.encode(),
            dtype.encode(),
            len(dims),
            shape,
            int(channels_last),
            ctypes.c_int64(groups),
            ctypes.c_float(eps),
            ctypes.byref(self._handle),
            self._message,
            ctypes.c_size_t(512),
        )
        if failed:
            raise Lacks(self._message.value.decode().partition(". ")[0])
        finalize(self, driver.driver_destroy, self._handle)
        self.implementation = driver.driver_implementation(self._handle).decode()

    def point(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self._arrays[name] = array
            data = ctypes.c_void_p(array.ctypes.data)
            self._check(
                self._driver.driver_point(self._handle, name.encode(), data, self._message, ctypes.c_size_t(512))
            )

    def __call__(self, n: int) -> None:
        self._check(self._driver.driver_run(self._handle, ctypes.c_int64(n), self._message, ctypes.c_size_t(512)))

    def _check(self, failed: int) -> None:
        if failed:
            raise RuntimeError(f"oneDNN: {self._message.value.decode()}")


def _contender(run: _Run, problem: Problem, recycled: bool, name: str, parameters: list[np.ndarray]) -> Contender:
    def arrays(result):
        return (result[0], *(p.copy() for p in result[1:]))

    note = run.implementation
    if recycled:
        given = aligned(problem.x.shape, problem.dtype)
        run.point(**{name: given})

        def call():
            run(1)
            return given, *parameters

        return Contender(call, arrays, many=run, note=note, hands_over=True)

    def fresh():
        result = np.empty(problem.x.shape, problem.dtype)
        run.point(**{name: result})
        run(1)
        return result, *parameters

    return Contender(fresh, arrays, note=note, hands_over=True)


def _backward(run: _Run, problem: Problem, recycled: bool) -> Contender:
    rstd = np.asarray(problem.rstd, np.float64)
    parameters = [np.empty(problem.case.channels, np.float32) for _ in range(2)]
    run.point(
        src=problem.x,
        diff_dst=problem.dy,
        scale=problem.weight.astype(np.float32),
        mean=np.ascontiguousarray(problem.mean, np.float32),
        variance=np.ascontiguousarray(1 / rstd**2 - problem.eps, np.float32),
        diff_scale=parameters[0],
        diff_shift=parameters[1],
    )
    return _contender(run, problem, recycled, "diff_src", parameters)


PEER = OneDnn()
