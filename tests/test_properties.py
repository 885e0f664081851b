"""Random shapes, axes, dtypes and strides against the reference and PyTorch; shift and scale invariance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import normfast as nf
from _cases import Case, batch
from _checks import BF16, DTYPES, F16, F32, F64, assert_forward, assert_gradients, assert_same_bits, bits
from normfast import reference

MOST = 40_000  # cells


@st.composite
def shapes(draw, least_rank=1):
    rank = draw(st.integers(least_rank, 5))
    # Small lengths, the lengths around a vector, and now and then a long one.
    lengths = st.one_of(
        st.integers(1, 9), st.integers(1, 40), st.sampled_from([15, 16, 17, 31, 32, 33, 64, 65, 127, 257])
    )
    shape = tuple(draw(lengths) for _ in range(rank))
    assume(np.prod(shape) <= MOST)
    return shape


@st.composite
def cases(draw):
    op = draw(st.sampled_from(["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"]))
    shape = draw(shapes(1 if op in ("layer_norm", "rms_norm") else 2))
    rank = len(shape)
    kw = {}
    if op in ("layer_norm", "rms_norm"):
        axes = draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
        axes = tuple(a - rank if draw(st.booleans()) else a for a in axes)
        kw["axis"] = axes[0] if len(axes) == 1 and draw(st.booleans()) else axes
    else:
        axis = draw(st.integers(0 if op == "batch_norm" else 1, rank - 1))
        channels = shape[axis]
        if op == "group_norm":
            kw["num_groups"] = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
        if op == "batch_norm":
            assume(np.prod(shape) > channels)
            kw["training"] = draw(st.booleans())
        kw["channel_axis"] = axis - rank if draw(st.booleans()) else axis
    permutation = draw(st.one_of(st.none(), st.permutations(range(rank)).map(tuple)))
    return Case(op, shape, permutation=permutation, **kw)


@st.composite
def relaid(draw, a):
    """The same values with other strides."""
    way = draw(st.sampled_from(["same", "reversed", "gaps", "swapped", "offset"]))
    if way == "reversed":
        flip = tuple(slice(None, None, draw(st.sampled_from([1, -1]))) for _ in a.shape)
        return a[flip].copy(order="K")[flip]
    if way == "gaps":
        steps = [draw(st.integers(1, 3)) for _ in a.shape]
        view = np.zeros([n * s for n, s in zip(a.shape, steps, strict=True)], a.dtype)
        view = view[tuple(slice(None, None, s) for s in steps)]
        view[...] = a
        return view
    if way == "swapped" and a.dtype != BF16:
        return a.astype(a.dtype.newbyteorder("S"))
    if way == "offset":
        view = np.empty(a.size + 3, a.dtype)[3:].reshape(a.shape)
        view[...] = a
        return view
    return a


dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
means = st.sampled_from([0.0, 0.5, -3.0, 100.0])


def param_dtypes(dtype):
    return st.sampled_from([dtype, F32, F64])


@given(st.data(), cases(), dtypes, seeds, means)
def test_forward(d, case, dtype, seed, mean):
    x = d.draw(relaid(case.x(dtype, seed, mean=mean)))
    weight = d.draw(st.none() | relaid(case.weight(d.draw(param_dtypes(dtype)), seed + 1)))
    bias = d.draw(st.none() | relaid(case.bias(d.draw(param_dtypes(dtype)), seed + 2))) if case.has_bias else None
    eps = d.draw(st.sampled_from([0.0, 1e-6, 1e-5, 1e-2]))
    before = bits(x)
    running = case.running(d.draw(st.sampled_from([F32, F64]))) if not case.training else None
    kw = {"running": running} if running else {}
    y, _, rstd = case.forward(x, weight, bias, eps=eps, return_stats=True, **kw)
    assert y.dtype == dtype
    assert y.shape == case.shape
    assert rstd.shape == case.stat_shape
    assert bits(x) == before
    assert_forward(y, case.exact_forward(x, weight, bias, eps=eps, **kw))


@given(st.data(), cases(), dtypes, seeds, means)
def test_backward(d, case, dtype, seed, mean):
    x, dy = d.draw(relaid(case.x(dtype, seed, mean=mean))), d.draw(relaid(case.dy(dtype, seed + 1)))
    param_dtype = d.draw(param_dtypes(dtype))
    weight = d.draw(st.none() | relaid(case.weight(param_dtype, seed + 2)))
    stats = case.exact_stats(x)
    needs = tuple(d.draw(st.lists(st.sampled_from(case.names), unique=True)))
    got = case.backward(dy, x, *stats, weight, needs=needs)
    assert [g is not None for g in got] == [name in needs for name in case.names]
    limit = 1e-10 if dtype == F64 and (weight is None or weight.dtype == F64) else 1e-6
    assert_gradients(got, case.exact_backward(dy, x, *stats, weight), limit)


@given(cases(), st.sampled_from([F32, F64]), seeds)
def test_against_the_reference(case, dtype, seed):
    """The same call on `normfast.reference`, in float64."""
    x, weight, bias = case.x(dtype, seed), case.weight(dtype, seed + 1), case.bias(dtype, seed + 2)
    positional, kw = {
        "layer_norm": ((weight, bias), {"axis": case.axis}),
        "rms_norm": ((weight,), {"axis": case.axis}),
        "group_norm": ((case.num_groups, weight, bias), {"channel_axis": case.channel_axis}),
        "instance_norm": ((weight, bias), {"channel_axis": case.channel_axis}),
        "batch_norm": (
            (*(case.running() if not case.training else (None, None)), weight, bias),
            {"channel_axis": case.channel_axis, "training": case.training},
        ),
    }[case.op]
    y, *stats = getattr(nf, case.op)(x, *positional, return_stats=True, **kw)
    wide = [p if p is None or isinstance(p, int) else p.astype(F64) for p in positional]
    want, *exact = getattr(reference, case.op)(x.astype(F64), *wide, return_stats=True, **kw)
    slack = 2e-6 if dtype == F32 else 1e-12
    scale = max(1.0, np.abs(want).max())
    np.testing.assert_allclose(y, want, rtol=slack, atol=slack * scale)
    for stat, value in zip(stats, exact, strict=True):
        assert stat.shape == value.shape
        np.testing.assert_allclose(stat, value, rtol=1e-6, atol=1e-6)


def through_torch(torch, case, x, weight, bias):
    """The norm of PyTorch on the same data: what is normalized or the channels moved to where it wants them."""
    functional, rank = torch.nn.functional, len(case.shape)
    if case.axis is not None:
        axes = sorted(a % rank for a in (case.axis if isinstance(case.axis, tuple) else (case.axis,)))
        last = list(range(rank - len(axes), rank))
        moved, size = torch.movedim(x, axes, last), list(case.param_shape)
        if case.op == "rms_norm":
            return torch.movedim(functional.rms_norm(moved, size, weight, case.eps), last, axes)
        return torch.movedim(functional.layer_norm(moved, size, weight, bias, case.eps), last, axes)
    moved = torch.movedim(x, case.channel_axis, 1)
    if case.op == "batch_norm":
        running = (None, None) if case.training else map(torch.from_numpy, case.running(F64))
        y = functional.batch_norm(moved, *running, weight, bias, case.training, 0.0, case.eps)
    else:  # its instance norm refuses one cell, its group norm does not
        y = functional.group_norm(moved, case.num_groups or moved.shape[1], weight, bias, case.eps)
    return torch.movedim(y, 1, case.channel_axis)


def agrees_with_torch(torch, case, x, dy, weight, bias, backward):
    """y and all gradients, to what float64 leaves of the largest terms."""
    tensors = [None if a is None else torch.from_numpy(a.copy()).requires_grad_() for a in (x, weight, bias)]
    want = through_torch(torch, case, *tensors)
    want.backward(torch.from_numpy(dy.copy()))
    kw = {} if case.training else {"running": case.running(F64)}
    y, mean, rstd = case.forward(x, weight, bias, return_stats=True, **kw)
    np.testing.assert_allclose(y, want.detach().numpy(), rtol=1e-10, atol=1e-10)
    size = max(1.0, rstd.max()) * np.abs(dy).max() * np.abs(weight).max() * x.size**0.5
    for got, tensor in zip(backward(dy, x, mean, rstd, weight), tensors, strict=False):
        np.testing.assert_allclose(got, tensor.grad.numpy(), rtol=1e-10, atol=1e-12 * size)


@pytest.mark.slow
@settings(max_examples=40)
@given(cases(), seeds)
def test_against_torch(case, seed):
    """Autograd through another library's norms, in float64: a gradient that is wrong here and in the reference."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if case.op in ("group_norm", "instance_norm"):  # PyTorch takes a single cell for a mistake
        groups = case.num_groups or case.shape[case.channel_axis]
        assume(np.prod(case.shape) > groups)
    x, dy, weight, bias = (
        case.x(F64, seed),
        case.dy(F64, seed + 1),
        case.weight(F64, seed + 2),
        case.bias(F64, seed + 3),
    )
    agrees_with_torch(torch, case, x, dy, weight, bias, case.backward)


@pytest.mark.slow
def test_torch_would_notice():
    """Negative control: the gradient with the statistics held constant."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    case = batch((6, 5, 7))
    arrays = case.x(F64), case.dy(F64), case.weight(F64), case.bias(F64)
    agrees_with_torch(torch, case, *arrays, case.backward)
    with pytest.raises(AssertionError):
        agrees_with_torch(torch, case, *arrays, case.with_(training=False).backward)


@given(cases(), seeds, st.sampled_from([-1024.0, -3.0, 0.25, 64.0, 8192.0]))
def test_shift_invariance(case, seed, shift):
    """Adding a constant changes nothing but the mean, as far as the shifted cells are representable."""
    assume(case.op != "rms_norm" and case.training)
    x = np.round(case.x(F64, seed) * 1024) / 1024
    moved = (x + shift).astype(F32)
    assert (moved.astype(F64) == x + shift).all()
    assert_forward(case.forward(moved), case.exact_forward(x))


@given(cases(), seeds, st.integers(-80, 80), st.sampled_from([F32, F64]))
def test_scale_invariance(case, seed, exponent, dtype):
    """At eps=0 a power of two in x comes out of everything exactly."""
    assume(case.training)
    x = case.x(dtype, seed)
    scaled = np.ldexp(x, exponent)
    y, mean, rstd = case.forward(x, eps=0.0, return_stats=True)
    assert_forward(case.forward(scaled, eps=0.0), case.exact_forward(x, eps=0.0))
    _, mean_s, rstd_s = case.forward(scaled, eps=0.0, return_stats=True)
    finite = np.isfinite(rstd)
    np.testing.assert_allclose(np.ldexp(rstd_s, exponent)[finite], rstd[finite], rtol=1e-6)
    if mean is not None:
        np.testing.assert_allclose(np.ldexp(mean_s, -exponent), mean, rtol=1e-6, atol=1e-6)
    assert y.dtype == dtype


@given(cases(), seeds, dtypes)
def test_out_gives_the_same_bits(case, seed, dtype):
    x, weight, bias = case.x(dtype, seed), case.weight(dtype), case.bias(dtype)
    want = case.forward(x, weight, bias)
    out = np.empty_like(x)
    assert case.forward(x, weight, bias, out=out) is out
    assert_same_bits(out, want)
    room = np.empty((*case.shape, 2), dtype)
    assert_same_bits(case.forward(x, weight, bias, out=room[..., 1]), want)
    assert case.forward(x, weight, bias, out=x) is x
    assert_same_bits(x, want)


@settings(max_examples=30)
@given(cases(), seeds, st.sampled_from([F16, F32, BF16]), st.integers(1, 7))
def test_threads_do_not_matter(case, seed, dtype, count):
    x, dy, weight, bias = case.x(dtype, seed), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    results = []
    for n in (1, count):
        with nf.threads(n):
            y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
            results.append((y, mean, rstd, *case.backward(dy, x, mean, rstd, weight)))
    assert_same_bits(*results)
