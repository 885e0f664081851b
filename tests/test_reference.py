"""`normfast.reference` against published numbers, against NumPy's own moments, and against finite differences."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from normfast import reference

F32, F64, LD = np.float32, np.float64, np.longdouble

# The example of the course notes: three images of four channels of 2x2.
IMAGES = np.array(
    [
        [[0, -2, 3, 0], [1, 0, 3, 0], [3, -1, 2, 2], [3, 1, 0, 1]],
        [[1, 2, 2, 2], [0, 0, -1, 0], [2, 1, -3, -1], [1, 3, -3, -1]],
        [[1, 1, -3, -3], [-1, -3, -1, 1], [-2, 1, 0, 0], [-3, -2, 0, -1]],
    ]
).reshape(3, 4, 2, 2)

# Name, shape of x, keywords of forward and backward, keywords of forward only.
GRADIENTS = [
    ("layer_norm", (3, 7), {}, {}),
    ("layer_norm", (2, 3, 4), {"axis": (2, 0)}, {}),
    ("layer_norm", (5, 3), {"axis": 0}, {}),
    ("layer_norm", (2, 3, 2), {"axis": (0, 1, 2)}, {}),
    ("rms_norm", (3, 7), {}, {}),
    ("rms_norm", (2, 5, 3), {"axis": (-1, 1)}, {}),
    ("group_norm", (2, 6, 3), {}, {"num_groups": 2}),
    ("group_norm", (2, 2, 3, 6), {"channel_axis": -1}, {"num_groups": 3}),
    ("instance_norm", (2, 3, 2, 2), {}, {}),
    ("instance_norm", (2, 4, 3), {"channel_axis": 2}, {}),
    ("batch_norm", (5, 3), {"training": True}, {}),
    ("batch_norm", (3, 2, 2, 2), {"training": True}, {}),
    ("batch_norm", (2, 4, 3), {"training": True, "channel_axis": -1}, {}),
    ("batch_norm", (4, 3), {"training": True, "channel_axis": 0}, {}),
    ("batch_norm", (3, 2, 4), {"training": False}, {}),
]


def parameter_shape(name, shape, both):
    if name in ("layer_norm", "rms_norm"):
        axes = np.atleast_1d(both.get("axis", -1)) % len(shape)
        return tuple(shape[i] for i in sorted(axes))
    return (shape[both.get("channel_axis", 1)],)


def draw(shape, dtype=LD, seed=1, mean=0.0, std=1.0):
    return np.random.default_rng(seed).normal(mean, std, shape).astype(dtype)


def differences(loss, a):
    """The gradient of ``loss()`` by ``a`` by central differences."""
    step = np.finfo(a.dtype).eps ** (a.dtype.type(1) / 3)
    gradient = np.empty_like(a)
    for i in np.ndindex(a.shape):
        centre = a[i]
        a[i] = centre + step
        above, up = loss(), a[i]
        a[i] = centre - step
        gradient[i] = (above - loss()) / (up - a[i])
        a[i] = centre
    return gradient


# ---- Published numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statistics", "means", "variances", "slack"),
    [
        (
            lambda x: reference.batch_norm(x, training=True, eps=0, return_stats=True),
            [0.333, -0.083, 0.333, -0.083],
            [3.722, 1.91, 3.056, 3.743],
            5e-4,
        ),
        (
            lambda x: reference.layer_norm(x, axis=(1, 2, 3), eps=0, return_stats=True),
            [1, 0.3125, -0.9375],
            [2.25, 2.965, 2.309],
            5e-4,
        ),
        (
            lambda x: reference.group_norm(x, 2, eps=0, return_stats=True),
            [[0.625, 1.375], [0.75, -0.125], [-1, -0.875]],
            [[2.484375, 1.734375], [1.1875, 4.359375], [3, 1.609375]],
            1e-12,
        ),
    ],
    ids=["batch", "layer", "two groups"],
)
def test_course_notes(statistics, means, variances, slack):
    y, mean, rstd = statistics(IMAGES)
    assert y.shape == IMAGES.shape
    np.testing.assert_allclose(mean.reshape(np.shape(means)), means, rtol=0, atol=slack)
    np.testing.assert_allclose(rstd.reshape(np.shape(means)) ** -2, variances, rtol=0, atol=slack)


def test_z_score():
    y = reference.layer_norm(np.array([4, 6213, 347]), eps=0)
    # The notes cut the last one, -0.64607, rather than round it.
    np.testing.assert_allclose(y, [-0.7664, 1.4125, -0.6460], rtol=0, atol=1e-4)


# ---- Against NumPy's moments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, 0, (1,), (2, 0), (-1, -2), (0, 1, 2)], ids=str)
def test_layer_and_rms_norm_by_numpy(axis):
    x = draw((4, 5, 6), F64, mean=3)
    mean, var = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
    shape = parameter_shape("layer_norm", x.shape, {"axis": axis})
    weight, bias = draw(shape, F64, 2), draw(shape, F64, 3)
    along = [n if kept == 1 else 1 for n, kept in zip(x.shape, mean.shape, strict=True)]
    y, got_mean, rstd = reference.layer_norm(x, weight, bias, axis=axis, eps=0.1, return_stats=True)
    want = (x - mean) / np.sqrt(var + 0.1) * weight.reshape(along) + bias.reshape(along)
    np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got_mean, mean, rtol=1e-14)
    np.testing.assert_allclose(rstd, 1 / np.sqrt(var + 0.1), rtol=1e-14)
    y, rstd = reference.rms_norm(x, weight, axis=axis, eps=0.1, return_stats=True)
    want = 1 / np.sqrt((x**2).mean(axis, keepdims=True) + 0.1)
    np.testing.assert_allclose(rstd, want, rtol=1e-14)
    np.testing.assert_allclose(y, x * want * weight.reshape(along), rtol=1e-13)


@pytest.mark.parametrize(
    ("shape", "channel_axis"), [((3, 6), 1), ((3, 6, 2, 5), 1), ((3, 4, 6), -1), ((3, 2, 6, 2), 2)], ids=str
)
def test_channel_norms_one_slice_at_a_time(shape, channel_axis):
    x = draw(shape, F64)
    weight, bias = draw(6, F64, 2), draw(6, F64, 3)
    kw = {"channel_axis": channel_axis, "eps": 0.1}

    def slices(a, sample, channels):
        return np.moveaxis(a, channel_axis, 1)[sample, channels]

    def normalized(part, first):
        part = part - part.mean()
        part = part / np.sqrt((part**2).mean() + 0.1)
        return [weight[first + i] * cells + bias[first + i] for i, cells in enumerate(part)]

    for groups in (1, 2, 3, 6):
        y, mean, rstd = reference.group_norm(x, groups, weight, bias, return_stats=True, **kw)
        size = 6 // groups
        for n, g in np.ndindex(3, groups):
            part = slice(g * size, (g + 1) * size)
            cells = slices(x, n, part)
            np.testing.assert_allclose(slices(y, n, part), normalized(cells, g * size), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose([mean[n, g], rstd[n, g] ** -2], [cells.mean(), cells.var() + 0.1], rtol=1e-12)
    for got, want in zip(
        reference.instance_norm(x, weight, bias, return_stats=True, **kw),
        reference.group_norm(x, 6, weight, bias, return_stats=True, **kw),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)
    y, mean, rstd = reference.batch_norm(x, None, None, weight, bias, training=True, return_stats=True, **kw)
    for c in range(6):
        cells = slices(x, slice(None), slice(c, c + 1))
        want = (cells - cells.mean()) / np.sqrt(cells.var() + 0.1) * weight[c] + bias[c]
        np.testing.assert_allclose(slices(y, slice(None), slice(c, c + 1)), want, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose([mean[c], rstd[c] ** -2], [cells.mean(), cells.var() + 0.1], rtol=1e-12)


def test_order_of_axes_does_not_matter():
    x, weight = draw((4, 5, 6), F64), draw((4, 6), F64, 2)
    for got, want in zip(
        reference.layer_norm(x, weight, axis=(-1, 0), return_stats=True),
        reference.layer_norm(x, weight, axis=(0, 2), return_stats=True),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


# ---- Batch norm's running statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize(
    ("keyword", "keep"), [({}, 0.9), ({"momentum": 0.1}, 0.9), ({"decay": 0.75}, 0.75), ({"decay": 0}, 0)]
)
def test_running_statistics(ddof, keyword, keep):
    x = draw((4, 3, 5), F64, mean=2)
    running_mean, running_var = np.array([1.0, 2, 3]), np.array([3.0, 2, 1], F32)
    reference.batch_norm(x, running_mean, running_var, training=True, running_ddof=ddof, **keyword)
    mean, var = x.mean((0, 2)), x.var((0, 2), ddof=ddof)
    np.testing.assert_allclose(running_mean, keep * np.array([1, 2, 3]) + (1 - keep) * mean, rtol=1e-14)
    np.testing.assert_allclose(running_var, keep * np.array([3, 2, 1]) + (1 - keep) * var, rtol=1e-7)


def test_evaluation():
    x = draw((4, 3), F32)
    running_mean, running_var = np.array([1.0, 2, 3]), np.array([3.0, 2, 1])
    y, mean, rstd = reference.batch_norm(x, running_mean, running_var, eps=0.5, return_stats=True)
    np.testing.assert_array_equal(mean, running_mean)
    np.testing.assert_allclose(rstd, 1 / np.sqrt(running_var + 0.5), rtol=1e-15)
    np.testing.assert_allclose(y, (x.astype(F64) - running_mean) * rstd, rtol=1e-7)
    np.testing.assert_array_equal(running_mean, [1, 2, 3])
    np.testing.assert_array_equal(running_var, [3, 2, 1])


# ---- Backward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize(("name", "shape", "both", "forward_only"), GRADIENTS)
def test_gradients_by_finite_differences(name, shape, both, forward_only, weighted):
    x, dy = draw(shape, seed=1, mean=0.5), draw(shape, seed=2)
    parameters = parameter_shape(name, shape, both)
    # Without a weight, the parameter gradients are those at ones and zeros.
    weight = draw(parameters, seed=3) if weighted else np.ones(parameters, LD)
    bias = draw(parameters, seed=4) if weighted else np.zeros(parameters, LD)
    has_mean = name != "rms_norm"
    given = {"weight": weight, "bias": bias} if has_mean else {"weight": weight}
    extra = dict(forward_only)
    if both.get("training") is False:
        extra |= {"running_mean": draw(parameters, seed=5), "running_var": draw(parameters, seed=6) ** 2}

    def forward(**kw):
        return getattr(reference, name)(x, **given, **both, **extra, eps=0.1, **kw)

    def loss():
        return (forward() * dy).sum()

    stats = forward(return_stats=True)[1:]
    names = ("x", *given)
    gradients = getattr(reference, f"{name}_backward")(
        dy, x, *stats, weight if weighted else None, **both, needs=None if weighted else names
    )
    assert len(gradients) == len(names)
    tolerance = 1e3 * float(np.finfo(LD).eps) ** (2 / 3)
    for gradient, a in zip(gradients, (x, *given.values()), strict=True):
        assert gradient.dtype == LD
        np.testing.assert_allclose(gradient, differences(loss, a), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weight", [None, np.ones(3)], ids=["no weight", "weight"])
def test_needs(weight):
    x = draw((4, 3), F64)
    everything = reference.layer_norm_backward(x, x, x[:, :1], x[:, 1:2], weight, needs=("x", "weight", "bias"))
    for needs in [(), ("x",), ("weight",), ["bias", "x"], ("x", "weight", "bias"), None]:
        wanted = needs if needs is not None else ("x",) if weight is None else ("x", "weight", "bias")
        got = reference.layer_norm_backward(x, x, x[:, :1], x[:, 1:2], weight, needs=needs)
        for name, gradient, full in zip(("x", "weight", "bias"), got, everything, strict=True):
            assert (gradient is not None) == (name in wanted)
            if gradient is not None:
                np.testing.assert_array_equal(gradient, full)


def test_no_gradient_where_rstd_is_infinite():
    x = np.array([[2.0, 2.0, 2.0], [1.0, 2.0, 3.0]])
    dy = np.array([[1.0, -1.0, 2.0], [1.0, 0.0, 0.0]])
    _, mean, rstd = reference.layer_norm(x, eps=0, return_stats=True)
    assert np.isposinf(rstd[0, 0])
    assert np.isfinite(rstd[1, 0])
    dx, dweight, dbias = reference.layer_norm_backward(dy, x, mean, rstd, needs=("x", "weight", "bias"))
    np.testing.assert_array_equal(dx[0], 0)
    assert np.abs(dx[1]).max() > 0.1
    np.testing.assert_allclose(dweight, [-np.sqrt(1.5), 0, 0], rtol=1e-15)
    np.testing.assert_array_equal(dbias, [2, -1, 2])
    _, rstd = reference.rms_norm(0 * x, eps=0, return_stats=True)
    for gradient in reference.rms_norm_backward(dy, 0 * x, rstd, needs=("x", "weight")):
        np.testing.assert_array_equal(gradient, 0)
    frozen = reference.batch_norm_backward(dy, x, x[0], np.array([np.inf, 1, 2]), training=False)[0]
    np.testing.assert_array_equal(frozen, dy * [0, 1, 2])


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.1, 1e7 + 0.5, -3e-39, 1e30, 0])
@pytest.mark.parametrize("dtype", [np.float16, F32, F64])
@pytest.mark.parametrize("eps", [0, 1e-5])
def test_constants_give_the_bias_exactly(value, dtype, eps):
    with np.errstate(over="ignore", under="ignore"):
        value = np.float64(value).astype(dtype)
    if not np.isfinite(value):
        value = np.finfo(dtype).max
    x = np.full((5, 6, 7), value, dtype)
    weight, bias = draw(7, F64, 2), draw(7, dtype, 3)
    np.testing.assert_array_equal(reference.layer_norm(x, weight, bias, eps=eps), np.broadcast_to(bias, x.shape))
    weight, bias = draw(6, F64, 2), draw(6, dtype, 3)
    want = np.broadcast_to(bias[:, None], x.shape)
    np.testing.assert_array_equal(reference.group_norm(x, 3, weight, bias, eps=eps), want)
    np.testing.assert_array_equal(reference.instance_norm(x, weight, bias, eps=eps), want)
    np.testing.assert_array_equal(reference.batch_norm(x, None, None, weight, bias, training=True, eps=eps), want)
    np.testing.assert_array_equal(reference.batch_norm(x, training=True, eps=eps), 0)


@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [(F32, 0, 1), (F32, 1e6, 1), (F32, 0, 1e30), (F32, 1e30, 1e29), (F32, 0, 1e-25), (F64, 0, 1), (F64, 1e4, 1)],
)
def test_exact_to_the_last_bits(dtype, mean, std):
    """Every cell against rational arithmetic; float64 has room for all float32 data."""
    x = draw((1, 501), dtype, mean=mean, std=std)
    cells = [Fraction(float(v)) for v in x[0]]
    exact_mean = sum(cells) / len(cells)
    exact_var = sum((c - exact_mean) ** 2 for c in cells) / len(cells)
    y, got_mean, rstd = reference.layer_norm(x.astype(F64), eps=0, return_stats=True)
    assert (
        abs(Fraction(float(got_mean[0, 0])) - exact_mean)
        <= abs(exact_mean) * Fraction(1, 2**52) + Fraction(std) / 2**52
    )
    assert abs(Fraction(float(rstd[0, 0])) ** 2 * exact_var - 1) <= Fraction(1, 2**50)
    # Square roots are irrational: compare y * sqrt(var) with x - mean, in units of the largest.
    root = Fraction(float(np.sqrt(LD(exact_var.numerator / exact_var.denominator))))
    errors = [abs(Fraction(float(v)) * root - (c - exact_mean)) for v, c in zip(y[0], cells, strict=True)]
    assert max(errors) <= max(abs(c - exact_mean) for c in cells) / 2**49


def test_non_finite_cells_stay_in_their_reduction():
    x = draw((4, 3, 5), F64)
    spoilt = x.copy()
    spoilt[1, 2, 3], spoilt[2, 0, 0] = np.inf, np.nan
    y, clean = reference.layer_norm(spoilt), reference.layer_norm(x)
    rows = [(1, 2), (2, 0)]
    for row in np.ndindex(4, 3):
        if row in rows:
            assert not np.isfinite(y[row]).all()
        else:
            np.testing.assert_array_equal(y[row], clean[row])


def test_constants_of_all_kinds():
    rng = np.random.default_rng(1)
    for n in [*range(1, 40), 127, 128, 129, 1000, 4097, 100_003]:
        x = rng.normal(size=(20, 1)) * 10.0 ** rng.integers(-300, 300, (20, 1))
        x = np.broadcast_to(x, (20, n))
        y, mean, rstd = reference.layer_norm(x, eps=0, return_stats=True)
        np.testing.assert_array_equal(y, 0)
        np.testing.assert_array_equal(mean, x[:, :1])
        assert np.isposinf(rstd).all()


# ---- Arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "result", "stats"),
    [
        ("?", "f8", "f8"),
        ("i4", "f8", "f8"),
        ("f2", "f2", "f4"),
        (">f2", "f2", "f4"),
        ("f4", "f4", "f8"),
        (">f4", "f4", "f8"),
        ("f8", "f8", "f8"),
    ],
)
def test_dtypes(dtype, result, stats):
    x = np.arange(12).reshape(3, 4).astype(dtype)
    y, mean, rstd = reference.layer_norm(x, return_stats=True)
    assert (y.dtype, mean.dtype, rstd.dtype) == (np.dtype(result), np.dtype(stats), np.dtype(stats))
    assert y.dtype.isnative
    for weight, wanted in [(None, result), (np.ones(4, F32), "f4"), (np.ones(4, ">f8"), "f8")]:
        dx, dweight, dbias = reference.layer_norm_backward(y, x, mean, rstd, weight, needs=("x", "weight", "bias"))
        assert (dx.dtype, dweight.dtype, dbias.dtype) == (np.dtype(result), np.dtype(wanted), np.dtype(wanted))


def test_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    x = draw((3, 40), F32).astype(ml_dtypes.bfloat16)
    y, mean, rstd = reference.layer_norm(x, return_stats=True)
    assert (y.dtype, mean.dtype, rstd.dtype) == (x.dtype, F32, F32)
    np.testing.assert_array_equal(y, reference.layer_norm(x.astype(F64)).astype(F32).astype(x.dtype))
    dx, dweight, _ = reference.layer_norm_backward(y, x, mean, rstd, np.ones(40, x.dtype))
    assert (dx.dtype, dweight.dtype) == (x.dtype, x.dtype)


def test_long_double_is_not_rounded():
    x = draw((3, 40), LD) + LD(2) ** -60
    y, mean, rstd = reference.batch_norm(x, training=True, return_stats=True)
    assert y.dtype == mean.dtype == rstd.dtype == LD
    if np.finfo(LD).eps < np.finfo(F64).eps:
        assert np.any(y != y.astype(F64))


@pytest.mark.parametrize("order", ["C", "F"])
def test_out(order):
    x, dy = draw((4, 6), F32), draw((4, 6), F32, 2)
    want, mean, rstd = reference.layer_norm(x, return_stats=True)
    out = np.empty(x.shape, F32, order=order)
    assert reference.layer_norm(x, out=out) is out
    np.testing.assert_array_equal(out, want)
    want = reference.layer_norm_backward(dy, x, mean, rstd)[0]
    assert reference.layer_norm_backward(dy, x, mean, rstd, out=dy)[0] is dy
    np.testing.assert_array_equal(dy, want)
    want = reference.group_norm(x, 2)
    assert reference.group_norm(x, 2, out=x) is x
    np.testing.assert_array_equal(x, want)


def test_no_reductions():
    stats = np.zeros((0, 1))
    y, mean, rstd = reference.layer_norm(np.zeros((0, 8), F32), return_stats=True)
    assert (y.shape, mean.shape, rstd.shape) == ((0, 8), (0, 1), (0, 1))
    dx, dweight, dbias = reference.layer_norm_backward(y, y, stats, stats, np.ones(8))
    assert dx.shape == (0, 8)
    np.testing.assert_array_equal([dweight, dbias], np.zeros((2, 8)))
    x = np.zeros((0, 6, 5))
    y, mean, rstd = reference.group_norm(x, 3, return_stats=True)
    assert (y.shape, mean.shape) == (x.shape, (0, 3))
    for gradient in reference.group_norm_backward(x, x, mean, rstd, np.ones(6))[1:]:
        np.testing.assert_array_equal(gradient, np.zeros(6))
    y, mean, rstd = reference.instance_norm(np.zeros((2, 0, 5)), return_stats=True)
    assert (y.shape, mean.shape) == ((2, 0, 5), (2, 0))
    y, mean, rstd = reference.batch_norm(np.zeros((4, 0)), training=True, return_stats=True)
    assert (y.shape, mean.shape) == ((4, 0), (0,))
    assert reference.batch_norm(np.zeros((0, 3)), np.zeros(3), np.ones(3)).shape == (0, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: reference.layer_norm(np.zeros((3, 0))),
        lambda: reference.layer_norm(np.zeros((0, 0))),
        lambda: reference.rms_norm(np.zeros((3, 0))),
        lambda: reference.group_norm(np.zeros((2, 4, 0)), 2),
        lambda: reference.instance_norm(np.zeros((0, 4, 0))),
        lambda: reference.batch_norm(np.zeros((0, 3)), training=True),
    ],
)
def test_reductions_over_nothing(call):
    with pytest.raises(ValueError, match="at least one element"):
        call()


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)])
def test_one_value_per_channel(shape):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        reference.batch_norm(np.zeros(shape), training=True)


def test_inputs_are_not_modified():
    arrays = [draw((4, 6), F64, seed) for seed in range(2)] + [
        draw((4, 1), F64, 2),
        draw((4, 1), F64, 3),
        draw(6, F64, 4),
    ]
    copies = [a.copy() for a in arrays]
    reference.layer_norm(arrays[0], arrays[4], arrays[4])
    reference.layer_norm_backward(*arrays)
    reference.group_norm(arrays[0], 2, arrays[4])
    for a, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(a, copy)
