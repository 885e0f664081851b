"""What is particular to layer norm: axes as in `np.mean`, parameters in the order of x, integers."""

from __future__ import annotations

import numpy as np
import pytest

import normfast as nf
from _cases import layer
from _checks import F32, F64, assert_forward, assert_gradients, assert_same_bits


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -4, (0, 1), (1, 3), (0, 3), (0, 2, 3), (1, 2), (0, 1, 2, 3)])
def test_axes(axis):
    """Shapes of the statistics and of the parameters, for every kind of axis."""
    case = layer((3, 5, 4, 7), axis=axis)
    x, weight, bias = case.x(), case.weight(), case.bias()
    y, mean, rstd = nf.layer_norm(x, weight, bias, axis=axis, return_stats=True)
    assert mean.shape == rstd.shape == np.mean(x, axis=axis, keepdims=True).shape
    assert_forward(y, case.exact_forward(x, weight, bias))
    np.testing.assert_allclose(mean, x.astype(F64).mean(axis=axis, keepdims=True), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("one", "other"), [((1, 2), (2, 1)), ((1, 3), (-1, -3)), ((0, 1, 2), (2, 0, 1)), (1, (1,)), (-1, 3)]
)
def test_order_of_axes_does_not_matter(one, other):
    """The parameters have the shape of x along the axes in the order that these have in x."""
    case = layer((3, 5, 4, 7), axis=one)
    x, dy, weight, bias = case.x(), case.dy(), case.weight(), case.bias()
    a = nf.layer_norm(x, weight, bias, axis=one, return_stats=True)
    assert_same_bits(a, nf.layer_norm(x, weight, bias, axis=other, return_stats=True))
    _, mean, rstd = a
    assert_same_bits(
        nf.layer_norm_backward(dy, x, mean, rstd, weight, axis=one),
        nf.layer_norm_backward(dy, x, mean, rstd, weight, axis=other),
    )


def test_numpy_integer_axes():
    x = layer((3, 5, 4)).x()
    assert_same_bits(nf.layer_norm(x, axis=np.int64(1)), nf.layer_norm(x, axis=1))
    assert_same_bits(nf.layer_norm(x, axis=(np.int8(0), np.intp(2))), nf.layer_norm(x, axis=(0, 2)))


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_integers_become_float64(dtype):
    x = (np.arange(35).reshape(5, 7) ** 2 % 11 > 4).astype(dtype) * dtype(1)
    y, mean, rstd = nf.layer_norm(x, return_stats=True)
    assert y.dtype == mean.dtype == rstd.dtype == F64
    assert_same_bits(y, nf.layer_norm(x.astype(F64)))


def test_integers_in_backward():
    """x and dy of integers or booleans, each by itself or beside float64."""
    x, dy = np.arange(35).reshape(5, 7) ** 2 % 11, np.arange(35).reshape(5, 7) % 3
    _, mean, rstd = nf.layer_norm(x, return_stats=True)
    want = nf.layer_norm_backward(dy.astype(F64), x.astype(F64), mean, rstd, needs=("x", "weight"))
    for d, v in [(dy, x), (dy.astype(np.uint8), x.astype(F64)), (dy.astype(F64), x.astype(np.int16))]:
        assert_same_bits(nf.layer_norm_backward(d, v, mean, rstd, needs=("x", "weight")), want)
    ones = nf.layer_norm_backward(np.ones(x.shape), x, mean, rstd, needs=("weight",))
    assert_same_bits(nf.layer_norm_backward(x > -1, x, mean, rstd, needs=("weight",)), ones)


def test_no_axes():
    """`axis=()` makes every cell a reduction of its own, as in `np.mean`; an array without dimensions has no others."""
    for x in (layer((3, 5)).x(), np.float32(3)):
        y, mean, rstd = nf.layer_norm(x, bias=F32.type(7), axis=(), return_stats=True)
        assert_same_bits(y, np.full_like(x, 7))
        assert_same_bits(mean, np.asarray(x, F64))
        assert mean.shape == rstd.shape == np.shape(x)
        np.testing.assert_allclose(rstd, 1e-5**-0.5, rtol=1e-15)
        dy = np.full_like(x, 2)
        dx, dweight, dbias = nf.layer_norm_backward(dy, x, mean, rstd, axis=(), needs=("x", "weight", "bias"))
        assert_same_bits(dx, np.zeros_like(x))
        assert dweight == 0
        assert dbias == 2 * np.size(x)


def test_gathered_axes_of_large_parts():
    """Axes that are gathered, where one step along the longest kept axis is more than the buffer is meant to hold."""
    case = layer((2, 3, 170_001), axis=(0, 2))
    x, dy, weight, bias = case.x(), case.dy(), case.weight(), case.bias()
    rows = np.ascontiguousarray(x.transpose(1, 0, 2))
    y, mean, rstd = nf.layer_norm(x, weight, bias, axis=(0, 2), return_stats=True)
    want = nf.layer_norm(rows, weight, bias, axis=(1, 2), return_stats=True)
    assert_same_bits((y.transpose(1, 0, 2), mean, rstd), (want[0], *(s.reshape(1, 3, 1) for s in want[1:])))
    dx = nf.layer_norm_backward(dy, x, mean, rstd, weight, axis=(0, 2), needs=("x",))[0]
    other = nf.layer_norm_backward(
        np.ascontiguousarray(dy.transpose(1, 0, 2)), rows, *want[1:], weight, axis=(1, 2), needs=("x",)
    )
    assert_same_bits(dx.transpose(1, 0, 2), other[0])


def test_array_likes():
    """Lists, tuples, and objects with `__array__`."""
    rows = [[1.0, 2.0, 4.0], [3.0, -1.0, 0.5]]

    class Wrapped:
        def __array__(self, dtype=None, copy=None):
            return np.array(rows, dtype=dtype or F32)

    want = nf.layer_norm(np.array(rows))
    assert_same_bits(nf.layer_norm(rows), want)
    assert_same_bits(nf.layer_norm(tuple(map(tuple, rows))), want)
    assert_same_bits(nf.layer_norm(Wrapped()), nf.layer_norm(np.array(rows, F32)))
    assert_same_bits(nf.layer_norm([[1, 2, 4], [3, -1, 0]]), nf.layer_norm([[1.0, 2.0, 4.0], [3.0, -1.0, 0.0]]))


def test_dlpack_on_the_cpu():
    """Having `__dlpack__` makes no array a CUDA array; its device does."""
    rows = layer((5, 7)).x()

    class Tensor:
        def __dlpack__(self, **kw):
            return rows.__dlpack__(**kw)

        def __dlpack_device__(self):
            return (1, 0)

        def __array__(self, dtype=None, copy=None):
            return rows

    assert_same_bits(nf.layer_norm(Tensor()), nf.layer_norm(rows))


def test_subclasses(tmp_path):
    """Subclasses of ndarray come in as the arrays they are; results are plain arrays."""
    mapped = np.memmap(tmp_path / "x", F32, "w+", shape=(5, 7))
    mapped[...] = layer((5, 7)).x()
    for x in (mapped, mapped.view(np.recarray)):
        y, mean, rstd = nf.layer_norm(x, return_stats=True)
        assert type(y) is type(mean) is type(rstd) is np.ndarray
        assert_same_bits(y, nf.layer_norm(np.array(mapped)))


def test_one_dimension():
    case = layer((67,), axis=0)
    x, dy, weight, bias = case.x(), case.dy(), case.weight(), case.bias()
    y, mean, rstd = nf.layer_norm(x, weight, bias, return_stats=True)
    assert mean.shape == rstd.shape == (1,)
    assert_forward(y, case.exact_forward(x, weight, bias))
    got = nf.layer_norm_backward(dy, x, mean, rstd, weight)
    assert_gradients(got, case.exact_backward(dy, x, mean, rstd, weight))


def test_results_are_fresh():
    """Every call returns memory of its own, writable and not that of an argument."""
    x, weight, bias = layer((4, 9)).x(), layer((4, 9)).weight(), layer((4, 9)).bias()
    results = [*nf.layer_norm(x, weight, bias, return_stats=True), *nf.layer_norm(x, weight, bias, return_stats=True)]
    for i, a in enumerate(results):
        assert a.flags.writeable
        assert a.flags.aligned
        others = [x, weight, bias, *results[:i]]
        assert not any(np.shares_memory(a, b) for b in others)
