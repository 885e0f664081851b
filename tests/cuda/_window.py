# SPDX-License-Identifier: BSD-3-Clause

"""Part of an array on a device, as an array of a library that nobody has heard of: any start, any strides."""

from __future__ import annotations

import numpy as np


class Window:
    """`base` is a DeviceArray, `start` and `strides` count its elements. Results of such arrays are DeviceArrays."""

    def __init__(self, base, shape, strides, start=0):
        self.base, self.shape, self.strides, self.start = base, tuple(shape), tuple(strides), start
        self.dtype, self.ndim = base.dtype, len(self.shape)

    @property
    def __cuda_array_interface__(self):
        interface = self.base.__cuda_array_interface__
        item = self.dtype.itemsize
        return interface | {
            "shape": self.shape,
            "strides": tuple(item * step for step in self.strides),
            "data": (interface["data"][0] + item * self.start, False),
        }

    def numpy(self):
        """A copy of the window, through one of all of its base."""
        memory = self.base.numpy().reshape(-1)[self.start :]
        strides = tuple(self.dtype.itemsize * step for step in self.strides)
        return np.lib.stride_tricks.as_strided(memory, self.shape, strides).copy()


def window(to_device, a, *, start=0, step=1, fill=99):
    """The values of `a`, C order, from `start` elements behind an aligned address, in steps along the last axis."""
    a = np.ascontiguousarray(a)
    room = np.full(start + a.size * step, fill, a.dtype)
    room[start::step] = a.reshape(-1)
    strides, length = [], step
    for n in reversed(a.shape):
        strides.insert(0, length)
        length *= n
    return Window(to_device(room), a.shape, strides, start)
