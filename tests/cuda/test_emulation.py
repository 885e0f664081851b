"""The CUDA kernels on the host, against `normfast.reference`: every norm, type and layout, the promises of docs/, and
whatever a schedule or an alignment could change.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from _kernels import Kernels, assert_y, backward, check_backward, check_forward, expect_forward, forward, plan
from _matrix import of_family, samples
from host import build as builder
from host.library import EmulationError, placed

from _cases import batch, data, group, instance, layer, rms, rng
from _checks import BF16, DTYPES, F16, F32, F64, assert_same_bits, nudged, same_bits, stat_dtype, ulp
from _oracle import exact
from normfast import reference

pytestmark = pytest.mark.skipif(not builder.available(), reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def built():
    return Kernels(builder.build("plain"))


@pytest.fixture
def lib(built):
    built.set_schedule(0)
    built.set_max_cluster(8)
    built.rooms.clear()
    return built


# ---- every geometry --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", samples(), ids=str)
def test_forward(lib, sample):
    sample.forward(lib)


@pytest.mark.parametrize("sample", samples(), ids=str)
def test_backward(lib, sample):
    sample.backward(lib)


def test_every_family_is_there():
    assert len(of_family("rows")) > 100
    assert len(of_family("columns")) > 100
    assert len(of_family("affine")) > 20


# One of each way through the kernels, small.
WAYS = [
    layer((7, 3)),
    layer((5, 67)),
    layer((3, 1024)),
    rms((5, 300)),
    rms((3, 1500)),
    layer((2, 9000)),
    group((2, 12, 5, 7), 4),
    group((2, 6, 20, 21), 2),
    instance((2, 3, 5, 7)),
    instance((2, 2, 40, 41)),
    batch((70, 37)),
    batch((6, 5, 3)),
    batch((3, 5, 33)),
    batch((2, 3, 32, 33)),
    instance((2, 9, 5, 7), channel_axis=-1),
    group((2, 9, 5, 12), 4, channel_axis=-1),
    group((2, 9, 5, 64), 2, channel_axis=-1),
    group((2, 5, 12, 7), 3, channel_axis=2),
    layer((2, 19, 6, 7), axis=1),
    rms((67, 37), axis=0),
]
# One type is enough for what takes long.
MOST = [F32, *(pytest.param(d, marks=pytest.mark.slow) for d in (F16, BF16, F64))]
TRAINED = [*WAYS, layer((2, 17001))]
ALL = [*WAYS, batch((6, 11, 35), training=False), batch((70, 12), training=False)]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def both_ways(lib, case, x, dy, weight, bias, eps=None):
    y, mean, rstd = check_forward(lib, case, x, weight, bias, eps=eps)
    exact_mean, exact_rstd = case.exact_stats(x, eps=eps)
    check_backward(lib, case, dy, x, exact_mean, exact_rstd, weight)
    return y, mean, rstd


@pytest.mark.parametrize(
    ("mean", "std", "eps"),
    [
        *((1e4, 1, None), (1e6, 1, None), (1e6, 1, 0), (-1e6, 30, None), (0, 1e30, None), (1e30, 1e30, 0)),
        *((0, 1e-25, 0), (1e-25, 1e-25, 0), (0, 1e-25, None), (0.7, 1.3, 0), (1e5, 0.1, 0)),
    ],
)
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_far_from_zero(lib, case, mean, std, eps):
    """float32: within 5 ulp whatever mean and scale; gradients within 1e-6."""
    x = case.x(F32, mean=mean, std=std)
    both_ways(lib, case, x, case.dy(F32), case.weight(F32), case.bias(F32), eps)


@pytest.mark.parametrize(("mean", "std"), [(1e4, 1), (-3e2, 1), (1e200, 1e200), (1e-160, 1e-160)])
@pytest.mark.parametrize("case", WAYS, ids=str)
def test_float64(lib, case, mean, std):
    x = case.x(F64, mean=mean, std=std)
    if std == 1:
        both_ways(lib, case, x, case.dy(F64), case.weight(F64), case.bias(F64), 0)
    elif 1e-100 < std * std < 1e100:
        check_forward(lib, case, x, case.weight(F64), case.bias(F64), eps=0)


@pytest.mark.parametrize(("dtype", "mean", "std"), [(F16, 300, 2), (F16, 0, 1e-6), (BF16, 1e4, 300), (BF16, 0, 1e30)])
@pytest.mark.parametrize("case", WAYS, ids=str)
def test_narrow_types(lib, case, dtype, mean, std):
    """The float32-accurate result, rounded once."""
    x = case.x(dtype, mean=mean, std=std)
    check_forward(lib, case, x, case.weight(F32), case.bias(F32), eps=0)
    check_forward(lib, case, x, case.weight(dtype), case.bias(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in TRAINED if c.has_mean], ids=str)
def test_constant_data_give_bias(lib, case, dtype):
    bias = case.bias(dtype)
    want = expect_forward(case, np.zeros(case.shape), None, bias, eps=1).y.astype(dtype)
    for value, eps in [(0.0, 0), (0.1, 1e-5), (0.1, 0), (-3e4, 0)]:
        x = np.full(case.shape, value, dtype)
        y, _, rstd = forward(lib, case, x, case.weight(dtype), bias, eps=eps)
        assert (np.isinf(rstd) == (eps == 0)).all()
        assert (y == want).all()
        assert (forward(lib, case, x, eps=eps)[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_no_gradient_through_constant_data(lib, case, dtype):
    """With eps = 0: rstd is infinite, the output does not depend on x."""
    x, dy = np.full(case.shape, 0 if case.op == "rms_norm" else 3.25, dtype), case.dy(dtype)
    _, mean, rstd = forward(lib, case, x, eps=0)
    assert np.isinf(rstd).all()
    dx, dweight, dbias = backward(lib, case, dy, x, mean, rstd, case.weight(dtype), needs=case.names)
    assert (dx == 0).all()
    assert (dweight == 0).all()
    assert dbias is None or np.isfinite(dbias.astype(F64)).all()


# ---- what belongs to one reduction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_nan_and_infinity_stay(lib, case, dtype, value):
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    cells = case.geometry.cells
    hit = len(cells) // 2

    def results(x, dy):
        y, mean, rstd = forward(lib, case, x, weight, bias)
        dx = backward(lib, case, dy, x, mean, rstd, weight, needs=("x",))[0]
        return [a.reshape(-1)[i] for a in (y, dx) for i in (cells,)], [rstd.reshape(-1)]

    (y, dx), (rstd,) = results(x, dy)
    spoiled = x.copy()
    spoiled.reshape(-1)[cells[hit][-1]] = value
    (y2, dx2), (rstd2,) = results(spoiled, dy)
    others = np.arange(len(cells)) != hit
    assert_same_bits((y2[others], dx2[others], rstd2[others]), (y[others], dx[others], rstd[others]))
    assert not np.isfinite(y2[hit].astype(F64)).all()
    spoiled = dy.copy()
    spoiled.reshape(-1)[cells[hit][-1]] = value
    (_, dx2), _ = results(x, spoiled)
    assert_same_bits(dx2[others], dx[others])
    if cells.shape[1] > 1 or case.op == "rms_norm":
        assert not np.isfinite(dx2[hit].astype(F64)).any()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_neighbours_that_float32_cannot_hold(lib, case, dtype):
    """What one reduction needs to be computed in double changes no other one, and both are right."""
    x, dy, weight, bias = case.x(dtype, mean=3e3, std=1), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    cells = case.geometry.cells
    others = np.arange(len(cells)) % 3 != 1
    tiny = x.copy()
    tiny.reshape(-1)[cells[~others]] = (data(cells[~others].shape, F64) * 1e-30).astype(dtype)
    results = []
    for a in (x, tiny):
        mean, rstd = case.exact_stats(a, eps=0)
        y = check_forward(lib, case, a, weight, bias, eps=0)[0]
        dx = check_backward(lib, case, dy, a, mean, rstd, weight, needs=("x",))[0]
        dx_too = check_backward(lib, case, dy, a, mean, rstd, weight)[0]
        results.append(tuple(b.reshape(-1)[cells][others] for b in (y, dx, dx_too)))
    if case.op == "batch_norm":  # promises no bits
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a.astype(F64), b.astype(F64), rtol=1e-2, atol=1e-2)
    else:
        assert_same_bits(*results)


# The first axis counts reductions, or samples with all of theirs. Batch norm makes no such promise.
SAMPLES = [
    *(layer((37, n)) for n in (1, 3, 67, 128)),
    *(layer((9, n)) for n in (300, 1031, 3000)),
    layer((5, 9000)),
    rms((37, 67)),
    rms((9, 1031)),
    layer((9, 19, 6, 7), axis=1),
    layer((9, 300, 3), axis=1),
    rms((9, 19, 6, 7), axis=1),
    group((9, 12, 5, 7), 4),
    group((9, 12, 1, 1), 4),
    group((4, 6, 30, 31), 2),
    group((9, 5, 7, 12), 4, channel_axis=-1),
    group((9, 5, 7, 64), 2, channel_axis=-1),
    group((9, 5, 12, 7), 3, channel_axis=2),
    instance((9, 5, 6, 11)),
    instance((9, 6, 11, 5), channel_axis=-1),
    instance((9, 3, 3, 17), channel_axis=-1),
]


def own_results(lib, case, x, dy, weight, bias):
    """Those of single reductions: y, their statistics, dx; computed without and with the gradients of parameters."""
    case = case.with_(shape=x.shape)
    y, mean, rstd = forward(lib, case, x, weight, bias)
    dx = backward(lib, case, dy, x, mean, rstd, weight, needs=("x",))[0]
    dx_too = backward(lib, case, dy, x, mean, rstd, weight, needs=case.names)[0]
    return y, mean, rstd, dx, dx_too


def pick(results, index):
    return tuple(None if r is None else np.ascontiguousarray(r[index]) for r in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_alone_and_among_others(lib, case, dtype):
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    want = own_results(lib, case, x, dy, weight, bias)
    n = case.shape[0]
    for some in (slice(0, 1), slice(n // 2, n // 2 + 1), slice(n - 1, n), slice(1, 4), slice(1, n)):
        assert_same_bits(own_results(lib, case, x[some], dy[some], weight, bias), pick(want, some))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *(layer((67, 37), axis=0), layer((5, 19, 37), axis=(0, 1)), rms((67, 37), axis=0)),
        *(layer((1031, 37), axis=0), layer((131, 257), axis=0)),
    ],
    ids=str,
)
def test_columns_side_by_side(lib, case, dtype):
    """A column alone, at every place of a vector, and in matrices of other widths."""
    x, dy = case.x(dtype), case.dy(dtype)
    weight, bias = case.weight(dtype), case.bias(dtype)
    want = own_results(lib, case, x, dy, weight, bias)
    last = case.shape[-1]
    for some in (*(slice(i, i + 1) for i in (0, 1, 7, last - 1)), *(slice(last - w, last) for w in (2, 7, 16, 33))):
        few = [np.ascontiguousarray(a[..., some]) for a in (x, dy)]
        assert_same_bits(own_results(lib, case, *few, weight, bias), pick(want, (..., some)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instances_side_by_side(lib, dtype):
    case = instance((3, 61, 37), channel_axis=-1)
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    y, mean, rstd, dx, dx_too = own_results(lib, case, x, dy, weight, bias)
    for one in (slice(0, 1), slice(13, 14), slice(36, 37), slice(5, 20)):
        few = [np.ascontiguousarray(a[..., one]) for a in (x, dy)]
        want = pick((y, mean, rstd, dx, dx_too), (..., one))
        assert_same_bits(own_results(lib, case, *few, weight[one], bias[one]), want)


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("each", [3, 32])
def test_groups_side_by_side(lib, dtype, channel_axis, each):
    shape = (3, 12 * each, 31) if channel_axis == 1 else (3, 31, 12 * each)
    case = group(shape, 12, channel_axis=channel_axis)
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype)
    y, mean, rstd, dx, dx_too = own_results(lib, case, x, dy, weight, bias)
    for g in (0, 5, 11):
        own = slice(each * g, each * g + each)
        at = (slice(None), own) if channel_axis == 1 else (..., own)
        few = [np.ascontiguousarray(a[at]) for a in (x, dy)]
        got = own_results(lib, case.with_(num_groups=1), *few, weight[own], bias[own])
        stats = pick((mean, rstd), (slice(None), slice(g, g + 1)))
        assert_same_bits(got, (*pick((y,), at), *stats, *pick((dx, dx_too), at)))


# ---- what changes no bit ---------------------------------------------------------------------------------------------


def everything(lib, case, x, dy, weight, bias):
    y, mean, rstd = forward(lib, case, x, weight, bias)
    if not case.training:
        mean, rstd = (a.reshape(case.stat_shape) for a in (mean, rstd))
    return y, mean, rstd, *backward(lib, case, dy, x, mean, rstd, weight)


@pytest.mark.parametrize("dtype", MOST, ids=str)
@pytest.mark.parametrize("case", [*ALL, layer((2, 20001))], ids=str)
def test_alignment(lib, case, dtype):
    """Of every array, together and one at a time: the same bits wherever the first cell lies."""
    arrays = [case.x(dtype), case.dy(dtype), case.weight(F32), case.bias(F32)]
    want = everything(lib, case, *arrays)
    for shift in (1, 3, 16 // dtype.itemsize - 1):
        moved = [None if a is None else placed(a, shift * a.itemsize) for a in arrays]
        assert_same_bits(everything(lib, case, *moved), want)
    for i, a in enumerate(arrays):
        if a is not None:
            assert_same_bits(everything(lib, case, *arrays[:i], placed(a, a.itemsize), *arrays[i + 1 :]), want)
    x, dy, weight, bias = arrays
    room = lib.room(case.shape, dtype, dtype.itemsize)
    assert_same_bits(forward(lib, case, x, weight, bias, out=room)[0], want[0])
    for needs in (case.names, ("x",)):
        room = lib.room(case.shape, dtype, dtype.itemsize)
        aligned = backward(lib, case, dy, x, *want[1:3], weight, needs=needs)[0]
        assert_same_bits(backward(lib, case, dy, x, *want[1:3], weight, needs=needs, out=room)[0], aligned)


@pytest.mark.parametrize("cluster", [8, 1])
@pytest.mark.parametrize("dtype", MOST, ids=str)
@pytest.mark.parametrize("case", [*ALL, layer((1, 9001)), group((1, 4, 60, 61), 1)], ids=str)
def test_schedule(lib, case, dtype, cluster):
    arrays = [case.x(dtype), case.dy(dtype), case.weight(F32), case.bias(F32)]
    lib.set_max_cluster(cluster)
    want = everything(lib, case, *arrays)
    for seed in (1, 2, 3, 4, 5, 11):
        lib.set_schedule(seed)
        assert_same_bits(everything(lib, case, *arrays), want)


@pytest.mark.parametrize("dtype", MOST, ids=str)
@pytest.mark.parametrize("case", [*ALL, layer((1, 70001)), rms((3, 5000)), group((2, 4, 91, 93), 2)], ids=str)
@pytest.mark.parametrize("cluster", [8, 1])
def test_in_place(lib, case, dtype, cluster):
    """y over x, dx over dy, dx over x."""
    lib.set_max_cluster(cluster)
    lib.set_schedule(3)
    x, dy, weight, bias = case.x(dtype), case.dy(dtype), case.weight(F32), case.bias(F32)
    y, mean, rstd, *gradients = everything(lib, case, x, dy, weight, bias)
    for needs in (case.names, ("x",)):
        for over in (0, 1):
            both = [dy.copy(), x.copy()]
            got = backward(lib, case, *both, mean, rstd, weight, needs=needs, out=both[over])
            assert got[0] is both[over]
            if needs == case.names:
                assert_same_bits(got, tuple(gradients))
            elif not case.with_(op="rms_norm").has_mean or len(case.param_shape) == 1:
                alone = backward(lib, case, dy, x, mean, rstd, weight, needs=needs)
                assert_same_bits(got[0], alone[0])
    out = x.copy()
    assert_same_bits(forward(lib, case, out, weight, bias, out=out), (y, mean, rstd))


# ---- what is given, what is wanted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_needs(lib, case):
    """Each result alone; what is not wanted is not asked for."""
    wanted = [("x",), ("weight",), ("bias",), ("weight", "bias"), ("x", "bias"), ("x", "weight")]
    for needs, dtype in itertools.product(wanted, (F32, F16)):
        if not set(needs) <= set(case.names):
            continue
        x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(F32)
        mean, rstd = case.exact_stats(x)
        got = check_backward(lib, case, dy, x, mean, rstd, weight, needs=needs)
        assert [a is not None for a in got] == [n in needs for n in ("x", "weight", "bias")]


@pytest.mark.parametrize("case", [c for c in WAYS if plan(c)[0] == "columns" and c.has_mean], ids=str)
def test_frozen(lib, case):
    """Only batch norm offers it; the kernels of columns take it in every geometry."""
    x, dy, weight = case.x(F32), case.dy(F32), case.weight(F32)
    mean, rstd = case.exact_stats(x)
    got = backward(lib, case, dy, x, mean, rstd, weight, frozen=True)
    want = case.with_(training=False).exact_backward(dy, x, mean, rstd, weight)
    np.testing.assert_allclose(got[0], want.dx.astype(F64), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(got[1], want.dweight.astype(F64), rtol=1e-5, atol=1e-5 * want.dweight_terms)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_statistics_not_wanted(lib, case):
    x, weight, bias = case.x(F32), case.weight(F32), case.bias(F32)
    y, mean, rstd = forward(lib, case, x, weight, bias, stats=False)
    assert mean is None
    assert rstd is None
    assert_same_bits(y, forward(lib, case, x, weight, bias)[0])


@pytest.mark.parametrize("types", [(w, b) for w in DTYPES for b in (F32, F64)], ids=lambda t: f"{t[0]}-{t[1]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_of_parameters(lib, dtype, types):
    """Weight and bias may differ from x and from each other."""
    for case in (layer((3, 67)), layer((3, 2049)), group((2, 6, 5), 2), batch((9, 37)), layer((2, 9, 5), axis=1)):
        check_forward(lib, case, case.x(dtype), case.weight(types[0]), case.bias(types[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "g"),
    [
        *(("rows", g) for g in ((0, 8, 1, 1), (0, 5000, 1, 1), (0, 3, 10, 4), (0, 1, 10, 4))),
        *(("columns", g) for g in ((0, 3, 5, 1, 1), (0, 3, 5, 40, 1), (0, 3, 5, 1, 0))),
        *(("columns", g) for g in ((1, 0, 5, 1, 1), (1, 0, 5, 40, 40), (1, 3, 0, 40, 40))),
    ],
)
def test_nothing_to_reduce(lib, name, g, dtype):
    """Zero parameter gradients, and nothing else written."""
    x = np.zeros((0,), dtype)
    count = g[0] if name == "rows" else g[0] * g[2]
    mean = rstd = np.ones(count, stat_dtype(dtype))
    for needs in (("x", "weight", "bias"), ("weight",), ("bias",), ("x",)):
        got = getattr(lib, f"{name}_backward")(x, x, g, mean, rstd, None, needs=needs)
        assert all((a == 0).all() for a in got[1:] if a is not None)
    if count == 0:
        getattr(lib, f"{name}_forward")(x, g)


RUNNING = [batch((7, 5)), batch((300, 37)), batch((5, 3, 4)), batch((5, 3, 16)), batch((4, 6, 5, 7), channel_axis=-1)]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("types", [(F32, F32), (F64, F64), (F16, F32)], ids=str)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_running_averages(lib, case, types, ddof):
    dtype, kept = types
    x = case.x(dtype)
    mean, var = (a.astype(kept) for a in case.running())
    want = [exact(mean), exact(var)]
    where = {"channel_axis": case.channel_axis, "momentum": 0.3, "running_ddof": ddof}
    reference.batch_norm(exact(x), *want, training=True, **where)
    got = check_forward(lib, case, x, case.weight(), case.bias(), running=(mean, var), running_weight=0.3, ddof=ddof)
    for a, b in zip((mean, var), want, strict=True):
        assert a.dtype == kept
        assert (np.abs(exact(a) - b) <= (0.51 if kept == F32 else 4) * ulp(b, kept) + 2e-7 * np.abs(b)).all()
    assert_same_bits(got, forward(lib, case, x, case.weight(), case.bias()))


def test_evaluation_with_extreme_statistics(lib):
    """Means and variances that float32 cannot hold, or hardly, beside ordinary ones."""
    case = batch((5, 7, 9), training=False)
    mean = np.array([0, 1e-30, 1e30, 0.7, 1e38, 3, 1e5])
    var = np.array([1, 1e-60, 1e60, 0, 1e70, 1e-40, 1e-3])
    x = (rng().standard_normal(case.shape) * np.sqrt(var)[:, None] + mean[:, None]).astype(F32)
    y, got_mean, rstd = forward(lib, case, x, running=(mean, var), eps=1e-38)
    want = expect_forward(case, x, running=(mean, var), eps=1e-38)
    assert_y(y, want)
    np.testing.assert_array_equal(got_mean, mean)
    np.testing.assert_allclose(rstd, 1 / np.sqrt(var + 1e-38), rtol=1e-15)


# ---- copies ----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.transpose(2, 0, 1),
    "reversed": lambda a: a[::-1, :, ::-2],
    "broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "empty": lambda a: a[:0],
    "cell": lambda a: a[1, 2, 3, ...],
    "ones": lambda a: a[None, :, None, :1, None],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies(lib, dtype, to, layout):
    with np.errstate(over="ignore"):  # infinity in float16
        x = LAYOUTS[layout](data((5, 7, 131), dtype, mean=0.01, std=1e4))
        want = x.astype(to)
    out = lib.room(x.shape, to)
    assert_same_bits(lib.copy_cells(x, out=out), want)
    if x.ndim == 3:  # out in another order too
        room = lib.room(x.shape[::-1], to)
        assert_same_bits(lib.copy_cells(x, out=room.transpose()), want)


@pytest.mark.parametrize("code", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"])
def test_copies_of_whole_numbers(lib, code):
    x = rng().integers(0, 2**60, (9, 40)).astype(code)[:, ::3]
    assert_same_bits(lib.copy_cells(x, F64), x.astype(F64))
    with pytest.raises(EmulationError) as e:
        lib.copy_cells(x, F32)
    assert e.value.code == 801


def test_many_axes(lib):
    x = data((2,) * 16)
    assert_same_bits(lib.copy_cells(x.transpose()), np.ascontiguousarray(x.transpose()))


# ---- long rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [8, 1])
@pytest.mark.parametrize("case", [layer((1, 70001)), rms((2, 60001)), group((1, 3, 30011), 1)], ids=str)
def test_more_than_the_chip_holds(lib, case, cluster):
    """What is not kept in shared memory is read again."""
    lib.set_max_cluster(cluster)
    lib.set_schedule(2)
    x = case.x(F32, mean=1e3)
    both_ways(lib, case, x, case.dy(F32), case.weight(F32), case.bias(F32))


@pytest.mark.parametrize(("shape", "dtype"), [((131, 4101), F32), ((70, 4104), F16), ((66, 2050), F64)], ids=str)
def test_slices_of_wide_rows(lib, shape, dtype):
    """Without clusters: the gradients of parameters from slices of the rows."""
    case = layer(shape)
    lib.set_max_cluster(1)
    x = case.x(dtype)
    check_backward(lib, case, case.dy(dtype), x, *case.exact_stats(x), case.weight(F32))


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [8, 1])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("make", [layer, rms, lambda shape: instance((1, *shape))])
def test_a_million_cells(lib, make, dtype, cluster):
    case = make((1, 1_000_000))
    lib.set_max_cluster(cluster)
    x = case.x(dtype, mean=100.0)
    both_ways(lib, case, x, case.dy(dtype), case.weight(F32), case.bias(F32))


# ---- the sanitizer, and the tests themselves -------------------------------------------------------------------------

SWEEP = "import sys, _matrix; sys.exit(_matrix.sweep(sys.argv[1], 1) > 0)"


@pytest.mark.slow
def test_sanitizer():
    """All cases, both ways, under AddressSanitizer and UBSan."""
    if not builder.sanitizer_available():
        pytest.skip("needs AddressSanitizer")
    done = builder.sanitized(["-c", SWEEP, builder.build("asan")])
    assert done.returncode == 0, done.stderr[-8000:]
    assert int(done.stdout) == 2 * len(samples()) >= 500


def test_the_checks_notice_errors(lib):
    """Negative controls: one wrong bit, one cell beyond a result, one cell not written."""
    case = layer((5, 67))
    x, weight = case.x(F32), case.weight(F32)
    y = forward(lib, case, x, weight)[0]
    assert not same_bits(nudged(y), y)
    with pytest.raises(AssertionError, match="ulp"):
        assert_y(y * np.float32(1 + 2e-6), expect_forward(case, x, weight))
    lib.room((3,), F32)
    lib.rooms[-1][0][-1] = 0
    with pytest.raises(AssertionError, match="past a result"):
        forward(lib, case, x, weight)
    lib.rooms.clear()
    room = lib.room((2,), F32)
    assert np.isnan(room).all()
