# SPDX-License-Identifier: BSD-3-Clause

"""Small shapes through every family of kernels, to be run under compute-sanitizer:

    compute-sanitizer --tool racecheck python tests/cuda/sanitize.py

Nothing but NumPy and normfast is imported. Results are compared with the reference, coarsely.
"""

from __future__ import annotations

import sys

import numpy as np
from _window import window

import normfast as nf

# Rows of a few lanes, of a block, of a cluster, larger than the chip; odd lengths; every kind of parameter.
ROWS = [(67, 5), (9, 67), (33, 1024), (3, 2051), (2, 9001), (1, 70_001), (1, 600_000)]
COLUMNS = [(67, 5), (257, 96), (1031, 40)]
IMAGES = [(3, 12, 5, 7), (2, 8, 31, 33), (2, 64, 8, 8)]
RNG = np.random.default_rng(7)


def draw(*shape, dtype=np.float32):
    return (RNG.standard_normal(shape) * 1.3 + 0.7).astype(dtype)


def agree(what, got, want):
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        if (g is None) != (w is None):
            raise AssertionError(f"{what}: result {number} is {g}, expected {w}")
        if g is None:
            continue
        g, w = g.numpy().astype(np.float64), np.asarray(w).astype(np.float64)
        error, size = np.abs(g - w).max(), np.abs(w).max()
        if not error <= (2e-3 if g.size else 0) * max(size, 1e-3):
            raise AssertionError(f"{what}: result {number} is off by {error:.2g}, the largest value is {size:.2g}")


def both(name, shape, x, params, place=nf.cuda.to_device, groups=None, **keywords):
    """Forward with statistics, then backward, on the device and by the reference."""
    what = f"{name} {'x'.join(map(str, shape))} {x.dtype} {keywords}"
    print(what, flush=True)
    # The statistics of batch norm in evaluation come first.
    extra = () if groups is None else (groups,)
    if name == "batch_norm":
        extra = () if keywords.get("training") else (draw(params[0].size), draw(params[0].size) ** 2 + 1)
    named = {"weight": params[0]} if name == "rms_norm" else {"weight": params[0], "bias": params[1]}
    there = tuple(place(a) if isinstance(a, np.ndarray) else a for a in extra)
    on_device = {key: place(a) for key, a in named.items()}
    got = getattr(nf, name)(place(x), *there, **on_device, **keywords, return_stats=True)
    want = getattr(nf.reference, name)(x, *extra, **named, **keywords, return_stats=True)
    agree(what, got, want)
    dy = draw(*x.shape, dtype=x.dtype)
    arguments = (dy, x, *(s.numpy() for s in got[1:]), params[0])
    there = [place(dy), place(x), *got[1:], on_device["weight"]]
    got = getattr(nf, name + "_backward")(*there, **keywords)
    agree(what + " backward", got, getattr(nf.reference, name + "_backward")(*arguments, **keywords))


def main(quick):
    dtypes = (np.float32, np.float16)
    for dtype in dtypes:
        for shape in ROWS[: 5 if quick else None]:
            if dtype == np.float16 and shape[1] > 10_000:
                continue
            params = draw(2, shape[1], dtype=dtype)
            both("layer_norm", shape, draw(*shape, dtype=dtype), params)
        both("rms_norm", (65, 768), draw(65, 768, dtype=dtype), draw(1, 768, dtype=dtype))
        for shape in COLUMNS:
            both("layer_norm", shape, draw(*shape, dtype=dtype), draw(2, shape[0], dtype=dtype), axis=0)
        for shape in IMAGES:
            x, params = draw(*shape, dtype=dtype), draw(2, shape[1], dtype=np.float32)
            last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
            for y, axis in ((x, 1), (last, -1)):
                both("group_norm", y.shape, y, params, groups=4, channel_axis=axis)
                both("instance_norm", y.shape, y, params, channel_axis=axis)
                both("batch_norm", y.shape, y, params, channel_axis=axis, training=True)
                both("batch_norm", y.shape, y, params, channel_axis=axis, training=False)
    if not quick:
        both("batch_norm", (40, 2, 1200), draw(40, 2, 1200), draw(2, 2), training=True)
    both("layer_norm", (5, 37), draw(5, 37, dtype=np.float64), draw(2, 37, dtype=np.float64))

    # Arrays that start anywhere and have gaps: copies, and accesses of single elements.
    def apart(a):
        return window(nf.cuda.to_device, a, start=1, step=2)

    def shifted(a):
        return window(nf.cuda.to_device, a, start=3)

    for place in (apart, shifted):
        both("layer_norm", (9, 67), draw(9, 67), draw(2, 67), place)
        both("layer_norm", (2, 9000), draw(2, 9000), draw(2, 9000), place)
        both("batch_norm", (9, 5, 12), draw(9, 5, 12), draw(2, 5), place, training=True)
    nf.cuda.synchronize()
    print("all agree", flush=True)


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
