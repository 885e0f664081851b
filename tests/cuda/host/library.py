"""The kernels of csrc/cuda on the host, called with NumPy arrays.

    lib = Library(build("plain"))
    y, mean, rstd = lib.rows_forward(x, (count, channels, span, period), weight=w, eps=1e-5)

Geometries are tuples in the order of the fields of csrc/geometry.h; arrays are contiguous, of any of the four types and
any alignment. Results begin as NaN bytes, so that what a kernel does not write shows. An error of the emulation (a
divergent barrier, a misaligned access, ...) raises EmulationError.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from ctypes import POINTER, byref, c_char_p, c_double, c_int, c_int64, c_size_t, c_uint64, c_void_p

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# csrc/dtype.h, and what copy_cells takes besides
DTYPES = [np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
CELL_TYPES = DTYPES + [np.dtype(c) for c in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]

_ROWS = [c_int64] * 4
_COLUMNS = [c_int64] * 5 + [c_int]
_GIVEN = [c_void_p, c_int]
_SIGNATURES = {
    "rows_forward": [*_ROWS, c_int, c_void_p, c_void_p, *_GIVEN * 2, c_void_p, c_void_p, c_double, c_int],
    "rows_backward": [*_ROWS, c_int, *[c_void_p] * 2, *_GIVEN * 3, c_void_p, *_GIVEN * 2, c_int],
    "columns_forward": [
        *(*_COLUMNS, c_int, c_void_p, c_void_p, *_GIVEN * 2, c_void_p, c_void_p),
        *(*_GIVEN * 2, c_double, c_int, c_double, c_int),
    ],
    "columns_backward": [*_COLUMNS, c_int, *[c_void_p] * 2, *_GIVEN * 3, c_void_p, *_GIVEN * 2, c_int, c_int],
    "affine": [*[c_int64] * 5, c_int, c_void_p, c_void_p, *_GIVEN * 4, c_void_p, c_void_p, c_double],
    "copy_cells": [
        *(c_int, POINTER(c_int64), c_void_p, POINTER(c_int64), c_int),
        *(c_void_p, POINTER(c_int64), c_int),
    ],
}
_WITH_WORKSPACE = ("rows_backward", "columns_forward", "columns_backward")


class EmulationError(RuntimeError):
    """`code` is the number of a CUDA error."""

    def __init__(self, code, text):
        super().__init__(f"error {code}: {text}")
        self.code = code


def stat_dtype(dtype):
    return np.dtype(np.float32 if dtype.itemsize == 2 else np.float64)


def unwritten(shape, dtype, offset=0):
    """A contiguous array of NaN bytes whose address is `offset` bytes past an aligned one."""
    dtype = np.dtype(dtype)
    raw = np.empty(offset + math.prod(shape) * dtype.itemsize, np.uint8)
    raw[...] = 0xFF
    return raw[offset:].view(dtype).reshape(shape)


def placed(array, offset):
    """A copy of `array` at such an address."""
    copy = unwritten(array.shape, array.dtype, offset)
    copy[...] = array
    return copy


def num_parameters(g):
    """Of a Columns geometry."""
    _, outer, channels, span, param_span = g[:5]
    return outer if param_span == 0 else channels * span // param_span


def _address(array):
    if array is None:
        return None
    assert array.flags.c_contiguous
    return array.ctypes.data


def _given(array):
    return (None, 1) if array is None else (_address(array), DTYPES.index(array.dtype))


def _columns(g):
    return (*map(int, g[:5]), int(g[5]) if len(g) > 5 else 0)


class Library:
    def __init__(self, path):
        self.dll = ctypes.CDLL(str(path))
        self.dll.nf_last_error.restype = c_char_p
        self.dll.nf_allocate.restype = c_void_p
        self.dll.nf_allocate.argtypes = [c_size_t]
        self.dll.nf_free.argtypes = [c_void_p]
        self.dll.nf_set_schedule.argtypes = [c_uint64]
        for name, arguments in _SIGNATURES.items():
            extra = [c_void_p, POINTER(c_size_t)] if name in _WITH_WORKSPACE else []
            with contextlib.suppress(AttributeError):  # the selftest has no kernels of normfast
                getattr(self.dll, f"nf_{name}").argtypes = arguments + extra

    def set_schedule(self, seed):
        """0: threads take turns in order; else an order drawn from the seed, hostile to missing barriers."""
        self.dll.nf_set_schedule(seed)

    def set_max_cluster(self, n):
        """8, or 1 for a device without clusters."""
        self.dll.nf_set_max_cluster(n)

    def check(self, code):
        if code != 0:
            raise EmulationError(code, self.dll.nf_last_error().decode())

    def workspace(self, name, *arguments):
        size = c_size_t()
        self.check(getattr(self.dll, f"nf_{name}")(*arguments, None, byref(size)))
        return size.value

    def _call(self, name, *arguments):
        function = getattr(self.dll, f"nf_{name}")
        if name not in _WITH_WORKSPACE:
            return self.check(function(*arguments))
        size = self.workspace(name, *arguments)
        work = self.dll.nf_allocate(size) if size else None
        try:
            return self.check(function(*arguments, work, None))
        finally:
            if work:
                self.dll.nf_free(work)

    # ---- the functions of csrc/cuda/kernels.h --------------------------------------------------------------------

    def rows_forward(self, x, g, *, weight=None, bias=None, eps=1e-5, center=True, stats=True, out=None):
        y = unwritten(x.shape, x.dtype) if out is None else out
        mean, rstd = self._statistics(x, g[0], center, stats)
        self._call(
            *("rows_forward", *map(int, g), DTYPES.index(x.dtype), _address(x), _address(y)),
            *(*_given(weight), *_given(bias), _address(mean), _address(rstd), eps, int(center)),
        )
        return y, mean, rstd

    def rows_backward(
        self, dy, x, g, mean, rstd, weight=None, *, center=True, needs=("x", "weight", "bias"), dtype=None, out=None
    ):
        """`dtype` is that of dweight and dbias; if not given, that of `weight` or else of `x`."""
        dx, dweight, dbias = self._gradients(x, g[1] * g[3], weight, needs, dtype, out)
        self._call(
            *("rows_backward", *map(int, g), DTYPES.index(x.dtype), _address(dy), _address(x)),
            *(*_given(mean), *_given(rstd), *_given(weight)),
            *(_address(dx), *_given(dweight), *_given(dbias), int(center)),
        )
        return dx, dweight, dbias

    def columns_forward(
        self,
        x,
        g,
        *,
        weight=None,
        bias=None,
        running_mean=None,
        running_var=None,
        running_weight=0.1,
        ddof=1,
        eps=1e-5,
        center=True,
        stats=True,
        out=None,
    ):
        """The running averages are updated in place."""
        y = unwritten(x.shape, x.dtype) if out is None else out
        mean, rstd = self._statistics(x, g[0] * g[2], center, stats)
        self._call(
            *("columns_forward", *_columns(g), DTYPES.index(x.dtype), _address(x), _address(y)),
            *(*_given(weight), *_given(bias), _address(mean), _address(rstd)),
            *(*_given(running_mean), *_given(running_var), running_weight, ddof, eps, int(center)),
        )
        return y, mean, rstd

    def columns_backward(
        self,
        dy,
        x,
        g,
        mean,
        rstd,
        weight=None,
        *,
        center=True,
        frozen=False,
        needs=("x", "weight", "bias"),
        dtype=None,
        out=None,
    ):
        dx, dweight, dbias = self._gradients(x, num_parameters(g), weight, needs, dtype, out)
        self._call(
            *("columns_backward", *_columns(g), DTYPES.index(x.dtype), _address(dy), _address(x)),
            *(*_given(mean), *_given(rstd), *_given(weight)),
            *(_address(dx), *_given(dweight), *_given(dbias), int(center), int(frozen)),
        )
        return dx, dweight, dbias

    def affine(self, x, g, mean, var, *, weight=None, bias=None, eps=1e-5, stats=True, out=None):
        y = unwritten(x.shape, x.dtype) if out is None else out
        mean_out, rstd_out = self._statistics(x, g[2], True, stats)
        self._call(
            *("affine", *_columns(g)[:5], DTYPES.index(x.dtype), _address(x), _address(y)),
            *(*_given(mean), *_given(var), *_given(weight), *_given(bias)),
            *(_address(mean_out), _address(rstd_out), eps),
        )
        return y, mean_out, rstd_out

    def copy_cells(self, x, dtype=None, *, out=None):
        """Any strides on both sides."""
        y = unwritten(x.shape, x.dtype if dtype is None else dtype) if out is None else out
        longs = c_int64 * max(x.ndim, 1)
        self._call(
            *("copy_cells", x.ndim, longs(*x.shape), x.ctypes.data, longs(*x.strides), CELL_TYPES.index(x.dtype)),
            *(y.ctypes.data, longs(*y.strides), DTYPES.index(y.dtype)),
        )
        return y

    @staticmethod
    def _statistics(x, n, center, wanted):
        if not wanted:
            return None, None
        dtype = stat_dtype(x.dtype)
        return unwritten((n,), dtype) if center else None, unwritten((n,), dtype)

    @staticmethod
    def _gradients(x, n, weight, needs, dtype, out):
        dtype = np.dtype(dtype or (x if weight is None else weight).dtype)
        dx = None
        if "x" in needs:
            dx = unwritten(x.shape, x.dtype) if out is None else out
        return dx, *(unwritten((n,), dtype) if name in needs else None for name in ("weight", "bias"))
