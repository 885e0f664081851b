"""The norms on the kernels: which function with which geometry, and what it has to give.

A `Case` (tests/_cases.py) is one norm in one layout; here its calls go to csrc/cuda/ on the host. The values expected
are those of `normfast.reference` in long double; the units in which errors are measured come from tests/_oracle.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from host.library import Library, stat_dtype, unwritten

from _cases import Case
from _checks import F32, F64, assert_gradients, assert_stats, exact, forward_ulps
from normfast import reference

FORWARD_ULPS = {F64: 16}  # the others: 5 float32 ulps, 16-bit results rounded once more
GUARD = 0xA5


class Kernels(Library):
    """A library whose results lie between guard bytes. `guard=0` for the sanitizer, which guards better."""

    def __init__(self, path, guard=64):
        super().__init__(path)
        self.guard, self.rooms = guard, []

    def room(self, shape, dtype, offset=0):
        """Where a result goes: NaN bytes, `offset` bytes past an aligned address."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        if self.guard == 0:
            return unwritten(shape, dtype, offset)
        raw = np.full(offset + size + 2 * self.guard, GUARD, np.uint8)
        begin, end = self.guard + offset, self.guard + offset + size
        raw[begin:end] = 0xFF
        self.rooms.append((raw, begin, end))
        return raw[begin:end].view(dtype).reshape(shape)

    def _call(self, name, *arguments):
        super()._call(name, *arguments)
        for raw, begin, end in self.rooms:
            assert (raw[:begin] == GUARD).all(), "written before a result"
            assert (raw[end:] == GUARD).all(), "written past a result"
        self.rooms.clear()

    def _statistics(self, x, n, center, wanted):
        if not wanted:
            return None, None
        dtype = stat_dtype(x.dtype)
        return self.room((n,), dtype) if center else None, self.room((n,), dtype)

    def _gradients(self, x, n, weight, needs, dtype, out):
        dtype = np.dtype(dtype or (x if weight is None else weight).dtype)
        dx = None
        if "x" in needs:
            dx = self.room(x.shape, x.dtype) if out is None else out
        return dx, *(self.room((n,), dtype) if name in needs else None for name in ("weight", "bias"))


def plan(case: Case):
    """The family of kernels and the geometry. The axes normalized must be neighbours."""
    shape, ndim = case.shape, len(case.shape)
    if case.axis is not None:
        axes = case.axis if isinstance(case.axis, tuple) else (case.axis,)
        first, last = min(a % ndim for a in axes), max(a % ndim for a in axes)
        assert last - first == len(axes) - 1
        before, n, after = (math.prod(p) for p in (shape[:first], shape[first : last + 1], shape[last + 1 :]))
        return ("rows", (before, n, 1, 1)) if last == ndim - 1 else ("columns", (before, n, after, 1, 0, False))
    c = case.channel_axis % ndim
    span = math.prod(shape[c + 1 :])
    if case.op == "batch_norm":
        return "columns", (1, math.prod(shape[:c]), shape[c], span, span, True)
    groups = case.num_groups or shape[c]
    each = shape[c] // groups
    if c == 1:
        return "rows", (shape[0] * groups, each, span, groups)
    return "columns", (shape[0], math.prod(shape[1:c]), groups, each * span, span, False)


def _flat(a):
    return None if a is None else a.reshape(-1)


def _shaped(a, shape):
    return None if a is None else a.reshape(shape)


def forward(lib, case, x, weight=None, bias=None, *, eps=None, stats=True, out=None, running=None, **kw):
    """`y, mean, rstd` in the shapes of the public functions. `running`: mean and variance."""
    kind, g = plan(case)
    kw |= {"weight": _flat(weight), "bias": _flat(bias), "eps": case.eps if eps is None else eps, "stats": stats}
    kw["out"] = lib.room(x.shape, x.dtype) if out is None else out
    if not case.training:
        results = lib.affine(x, g, *(running or case.running()), **kw)
    else:
        if running is not None:
            kw |= {"running_mean": running[0], "running_var": running[1]}
        results = getattr(lib, f"{kind}_forward")(x, g, center=case.has_mean, **kw)
    return results[0], *(_shaped(a, case.stat_shape) for a in results[1:])


def backward(lib, case, dy, x, mean, rstd, weight=None, *, needs=None, out=None, **kw):
    kind, g = plan(case)
    if not case.training:
        kw["frozen"] = True
    function = getattr(lib, f"{kind}_backward")
    kw |= {"center": case.has_mean, "needs": case.names if needs is None else needs, "out": out}
    results = function(dy, x, g, _flat(mean), _flat(rstd), _flat(weight), **kw)
    return results[0], *(_shaped(a, case.param_shape) for a in results[1:])


def _reference(case, name, *arrays, **kw):
    arrays = [None if a is None else exact(a) for a in arrays]
    where = {"axis": case.axis} if case.axis is not None else {"channel_axis": case.channel_axis}
    return getattr(reference, name)(*arrays, **where, **kw)


def expect_forward(case, x, weight=None, bias=None, *, eps=None, running=None):
    """As tests/_oracle.py; the values are those of the reference."""
    eps = case.eps if eps is None else eps
    want = case.exact_forward(x, weight, bias, eps=eps, running=running)
    kw = {"eps": np.longdouble(eps), "return_stats": True}
    if case.op == "rms_norm":
        y, rstd = _reference(case, "rms_norm", x, weight, **kw)
        return replace(want, y=y, rstd=rstd)
    if case.op == "batch_norm":
        running = None if case.training else running or case.running()
        y, mean, rstd = _reference(
            case, "batch_norm", x, *(running or (None, None)), weight, bias, training=case.training, **kw
        )
    elif case.op == "group_norm":
        where = {"channel_axis": case.channel_axis}
        parameters = (None if a is None else exact(a) for a in (weight, bias))
        y, mean, rstd = reference.group_norm(exact(x), case.num_groups, *parameters, **where, **kw)
    else:
        y, mean, rstd = _reference(case, case.op, x, weight, bias, **kw)
    return replace(want, y=y, mean=mean, rstd=rstd)


def expect_backward(case, dy, x, mean, rstd, weight=None):
    want = case.exact_backward(dy, x, mean, rstd, weight)
    kw = {"needs": case.names} | ({"training": case.training} if case.op == "batch_norm" else {})
    statistics = (mean, rstd) if case.has_mean else (rstd,)
    if weight is None:
        weight = np.ones(case.param_shape)  # the same gradients, in long double
    results = _reference(case, f"{case.op}_backward", dy, x, *statistics, weight, **kw)
    return replace(want, **dict(zip(("dx", "dweight", "dbias"), results, strict=False)))


def assert_y(y, want):
    assert np.isfinite(y.astype(np.float64)).all()
    error, limit = forward_ulps(y, want), FORWARD_ULPS.get(y.dtype, 5)
    assert error <= limit, f"{error:.2f} ulp, at most {limit} are promised"


def check_forward(lib, case, x, weight=None, bias=None, **kw):
    """y and the statistics are right, and the inputs as they were. Returns the results."""
    out = kw.get("out")
    before = [None if a is None else a.copy() for a in (x, weight, bias)]
    got = forward(lib, case, x, weight, bias, **kw)
    names = {k: v for k, v in kw.items() if k in ("eps", "running")}
    want = expect_forward(case, *before, **names)
    assert_y(got[0], want)
    if got[2] is not None:
        assert_stats(*got[1:], want, x.dtype)
    for a, b in zip((x, weight, bias), before, strict=True):
        if a is not None and a is not out:
            assert a.tobytes() == b.tobytes(), "an input was written to"
    return got


def gradient_limit(*dtypes):
    return 1e-12 if all(d == F64 for d in dtypes) else 1e-6


def check_backward(lib, case, dy, x, mean, rstd, weight=None, *, out=None, dtype=None, **kw):
    inputs = (dy, x, mean, rstd, weight)
    before = [None if a is None else a.copy() for a in inputs]
    got = backward(lib, case, dy, x, mean, rstd, weight, out=out, dtype=dtype, **kw)
    want = expect_backward(case, *before)
    wide = [F64 if a is None or a.dtype == F64 else F32 for a in (x, *got[1:])]
    assert_gradients((got[0],), want, gradient_limit(wide[0]))
    assert_gradients((None, *got[1:]), want, gradient_limit(*wide))
    for a, b in zip(inputs, before, strict=True):
        if a is not None and a is not out:
            assert a.tobytes() == b.tobytes(), "an input was written to"
    return got
