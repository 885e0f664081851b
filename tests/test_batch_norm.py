"""What is particular to batch norm: running statistics, evaluation, frozen gradients."""

from __future__ import annotations

import threading
import time
import warnings

import numpy as np
import pytest

import normfast as nf
from _cases import batch, data
from _checks import BF16, DTYPES, F16, F32, F64, assert_forward, assert_gradients, assert_same_bits, assert_stats

CASES = [batch((6, 5, 7)), batch((6, 7, 5), channel_axis=-1), batch((19, 5)), batch((5, 6, 7), channel_axis=0)]
TINY = {F16: 2e-3, BF16: 2e-2, F32: 1e-6, F64: 1e-12}


def running_pair(channels, dtype):
    return data((channels,), dtype, 11, mean=0.4, std=0.2), (data((channels,), F64, 12) ** 2 + 0.5).astype(dtype)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("running", [F32, F64, None], ids=["float32", "float64", "dtype of x"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_running_statistics(case, dtype, running, ddof):
    """momentum weighs the new value; the variance that enters is divided by n - ddof."""
    running = running or dtype
    x = case.x(dtype)
    mean, var = running_pair(5, running)
    before_mean, before_var = mean.astype(F64), var.astype(F64)
    y = case.forward(x, running=(mean, var), momentum=0.3, running_ddof=ddof)
    want = case.exact_forward(x)
    assert_forward(y, want)
    n = x.size // 5
    batch_mean, batch_var = want.mean.astype(F64), want.var.astype(F64) * n / (n - ddof)
    # float64 running statistics of float32 data are as good as the statistics of the data.
    slack = TINY[running] if dtype == F64 else max(TINY[running], 1e-6)
    np.testing.assert_allclose(mean.astype(F64), 0.7 * before_mean + 0.3 * batch_mean, rtol=slack, atol=1e-6)
    np.testing.assert_allclose(var.astype(F64), 0.7 * before_var + 0.3 * batch_var, rtol=slack)
    assert mean.dtype == var.dtype == running


def test_defaults_of_the_running_average():
    """momentum 0.1, ddof 1."""
    case = CASES[0]
    x = case.x()
    one, other = running_pair(5, F32), running_pair(5, F32)
    case.forward(x, running=one)
    case.forward(x, running=other, momentum=0.1, running_ddof=1, decay=None)
    assert_same_bits(one, other)
    unbiased = x.astype(F64).var(axis=(0, 2), ddof=1)
    np.testing.assert_allclose(one[1], 0.9 * running_pair(5, F32)[1] + 0.1 * unbiased, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1100, 64, 7, 9), (260, 2100, 3, 3)], ids=str)
def test_planes_that_no_cache_holds(shape, threads):
    """The array is then read twice instead of block by block: several chunks of images, several blocks of channels."""
    case = batch(shape)
    x, dy, weight, bias = case.x(), case.dy(), case.weight(), case.bias()
    results = []
    for count in (1, 2, 3):
        threads(count)
        y, mean, rstd = case.forward(x, weight, bias, return_stats=True)
        results.append((y, mean, rstd, *case.backward(dy, x, mean, rstd, weight)))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
    y, mean, rstd, *gradients = results[0]
    want = case.exact_forward(x, weight, bias)
    assert_forward(y, want)
    assert_stats(mean, rstd, want, F32)
    assert_gradients(gradients, case.exact_backward(dy, x, mean, rstd, weight))


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9, 0.99, 1.0])
def test_decay_weighs_the_old_value(decay):
    case = CASES[0]
    x = case.x(F64)
    one, other = running_pair(5, F64), running_pair(5, F64)
    case.forward(x, running=one, decay=decay)
    case.forward(x, running=other, momentum=1 - decay)
    np.testing.assert_allclose(one, other, rtol=1e-14)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_extreme_momenta(dtype):
    case = CASES[0]
    x = case.x(dtype)
    kept = running_pair(5, dtype)
    case.forward(x, running=kept, momentum=0)
    assert_same_bits(kept, running_pair(5, dtype))
    replaced = running_pair(5, dtype)
    _, mean, _ = case.forward(x, running=replaced, momentum=1.0, return_stats=True)
    np.testing.assert_allclose(replaced[0], mean, rtol=2e-7)
    np.testing.assert_allclose(replaced[1], x.astype(F64).var(axis=(0, 2), ddof=1), rtol=1e-6)


def test_running_arrays_may_be_strided():
    case = CASES[0]
    x = case.x()
    plain = running_pair(5, F32)
    case.forward(x, running=plain)
    room = np.full((2, 5, 3), 77, F32)
    strided = room[0, ::-1, 1], room[1, :, 2]
    for s, p in zip(strided, running_pair(5, F32), strict=True):
        s[...] = p
    case.forward(x, running=strided)
    assert_same_bits(tuple(s.copy() for s in strided), plain)
    assert (room == 77).sum() == room.size - 10


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_running_arrays_may_be_byteswapped(dtype, order):
    """They are read and written in the byte order that they have."""
    case = CASES[0]
    x, plain = case.x(), running_pair(5, np.dtype(dtype))
    swapped = tuple(a.astype(order + dtype) for a in plain)
    case.forward(x, running=plain)
    case.forward(x, running=swapped)
    assert_same_bits(tuple(a.astype(dtype) for a in swapped), plain)
    evaluation = case.with_(training=False)
    assert_same_bits(evaluation.forward(x, running=swapped), evaluation.forward(x, running=plain))


def test_running_arrays_beyond_float32():
    """Those of float64 are never rounded to the type of x, which would warn and give infinity."""
    x = data((4, 1, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = nf.batch_norm(x, np.array([1e40]), np.array([1e80]))
        running = np.array([1e300]), np.array([1e300])
        nf.batch_norm(x, *running, training=True)
    np.testing.assert_array_equal(y, np.full(x.shape, -1, F32))
    np.testing.assert_allclose(running, 9e299, rtol=1e-15)


def test_what_others_write_meanwhile_counts():
    """The old value of a running statistic is read when the new one is written, not before the long way there."""
    x = np.zeros((64, 64, 64, 64), F32)
    seen = set()
    for wait in np.linspace(0, 0.03, 7):
        running = np.zeros(64, F32), np.ones(64, F32)
        thread = threading.Thread(target=nf.batch_norm, args=(x, *running), kwargs={"training": True, "momentum": 0.5})
        thread.start()
        time.sleep(wait)
        running[0][:] = 100
        thread.join()
        seen.add(running[0][0])
    assert seen <= {50.0, 100.0}  # 0: the 100 was lost


def test_running_arrays_in_the_memory_of_a_strided_x():
    """x is copied then, before anything is written: they are no part of what is read."""
    room = data((6, 5, 14))
    x, inside, plain = room[..., ::2], room.reshape(-1)[:10], running_pair(5, F32)
    inside.reshape(2, 5)[...] = plain
    want = nf.batch_norm(x.copy(), *plain, training=True)
    assert_same_bits(nf.batch_norm(x, inside[:5], inside[5:], training=True), want)
    assert_same_bits((inside[:5], inside[5:]), plain)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_running_arrays_of_16_bits_hold_every_number(dtype):
    """Momentum 0 keeps each of the 65536, momentum 1 rounds what lies beyond them to infinity."""
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    running = every.copy(), np.ones(1 << 16, dtype)
    with np.errstate(invalid="ignore"):  # NumPy's casts warn of NaN that signal
        nf.batch_norm(np.zeros((2, 1 << 16), dtype), *running, training=True, momentum=0)
        np.testing.assert_array_equal(running[0].astype(F64), every.astype(F64))
    large = np.array([[1e4], [-1e4]] if dtype == F16 else [[1e30], [-1e30]], dtype)
    nf.batch_norm(large, running[0][:1], running[1][:1], training=True, momentum=1)
    assert running[0][0] == 0
    assert np.isposinf(running[1][0].astype(F32))


def test_no_channels():
    """Nothing to reduce, in training with one value per channel too."""
    none = np.zeros(0, F32)
    for shape in ((1, 0), (4, 0), (4, 0, 3)):
        for training in (True, False):
            x = np.zeros(shape, F32)
            y, mean, rstd = nf.batch_norm(x, none, none, none, none, training=training, return_stats=True)
            assert y.shape == shape
            assert mean.shape == rstd.shape == (0,)
            gradients = nf.batch_norm_backward(x, x, mean, rstd, none, training=training)
            assert [g.shape for g in gradients] == [shape, (0,), (0,)]


def test_result_does_not_depend_on_running_statistics_in_training():
    case = CASES[0]
    x, weight, bias = case.x(), case.weight(), case.bias()
    plain = case.forward(x, weight, bias, return_stats=True)
    assert_same_bits(case.forward(x, weight, bias, running=running_pair(5, F32), return_stats=True), plain)
    assert_same_bits(case.forward(x, weight, bias, running=running_pair(5, F32), decay=0.5, return_stats=True), plain)


@pytest.mark.parametrize("running", [F32, F64, None], ids=["float32", "float64", "dtype of x"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_evaluation(case, dtype, running):
    case = case.with_(training=False)
    x, weight, bias = case.x(dtype), case.weight(dtype), case.bias(dtype)
    pair = running_pair(5, running or dtype)
    before = tuple(a.copy() for a in pair)
    for w, b in [(None, None), (weight, None), (None, bias), (weight, bias)]:
        y, mean, rstd = case.forward(x, w, b, running=pair, return_stats=True)
        want = case.exact_forward(x, w, b, running=pair)
        assert_forward(y, want)
        assert_stats(mean, rstd, want, dtype)
        assert_same_bits(case.forward(x, w, b, running=pair), y)
    assert_same_bits(pair, before)


def test_evaluation_is_the_default():
    x = CASES[0].x()
    mean, var = running_pair(5, F32)
    assert_same_bits(nf.batch_norm(x, mean, var), nf.batch_norm(x, mean, var, training=False))
    with pytest.raises(ValueError, match="running_mean"):
        nf.batch_norm(x)


def test_evaluation_returns_the_running_mean():
    """Exactly the running mean, and 1/sqrt(running_var + eps)."""
    x = CASES[0].x()
    mean, var = running_pair(5, F64)
    _, got_mean, got_rstd = nf.batch_norm(x, mean, var, eps=1e-3, return_stats=True)
    assert_same_bits(got_mean, mean)
    np.testing.assert_allclose(got_rstd, 1 / np.sqrt(var + 1e-3), rtol=1e-15)


@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
def test_evaluation_far_from_zero(offset):
    for case in (batch((6, 5, 7), training=False), batch((6, 7, 5), channel_axis=-1, training=False)):
        x = case.x(mean=offset)
        exact = case.with_(training=True).exact_forward(x)
        pair = exact.mean.astype(F64), exact.var.astype(F64)
        weight, bias = case.weight(), case.bias()
        assert_forward(case.forward(x, weight, bias, running=pair), case.exact_forward(x, weight, bias, running=pair))


def test_evaluation_of_one_value_per_channel():
    """Training refuses it; evaluation has nothing against it."""
    x = data((1, 5), F32)
    pair = running_pair(5, F32)
    case = batch((1, 5), training=False)
    assert_forward(case.forward(x, running=pair), case.exact_forward(x, running=pair))
    with pytest.raises(ValueError, match=r"^batch_norm: .*Expected more than 1 value per channel when training"):
        nf.batch_norm(x, *pair, training=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_frozen_gradients(case, dtype):
    """The statistics of evaluation are constants: dx is dy * weight * rstd."""
    case = case.with_(training=False)
    x, dy, weight = case.x(dtype), case.dy(dtype), case.weight(dtype)
    _, mean, rstd = case.forward(x, weight, running=running_pair(5, F32), return_stats=True)
    got = case.backward(dy, x, mean, rstd, weight)
    want = case.exact_backward(dy, x, mean, rstd, weight)
    assert_gradients(got, want)
    shape = [1] * x.ndim
    shape[case.channel_axis] = 5
    plain = dy.astype(F64) * (weight.astype(F64) * rstd.astype(F64)).reshape(shape)
    np.testing.assert_allclose(got[0].astype(F64), plain, rtol=TINY[dtype], atol=1e-7)


def test_training_is_the_default_of_backward():
    case = CASES[0]
    x, dy = case.x(), case.dy()
    stats = case.exact_stats(x)
    default = nf.batch_norm_backward(dy, x, *stats)
    assert_same_bits(default, nf.batch_norm_backward(dy, x, *stats, training=True))
    assert not np.array_equal(default[0], nf.batch_norm_backward(dy, x, *stats, training=False)[0])


def test_training_converges_to_evaluation():
    """After many steps on the same batch the running statistics are those of the batch."""
    x = CASES[0].x(F64)
    mean, var = running_pair(5, F64)
    for _ in range(400):
        y = nf.batch_norm(x, mean, var, training=True, running_ddof=0)
    np.testing.assert_allclose(nf.batch_norm(x, mean, var), y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "step", "count"), [(F16, 2.0**-10, 20_001), (BF16, 2.0**-7, 200_001)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_running_statistics_are_rounded_once(dtype, step, count, sign):
    """A mean nearer to a tie than float32 can tell: by way of float32 it would go to the even side, whatever it is."""
    for low in (1, 1 + step):
        for more in (0, 1):  # cells with the higher number: one less than the others, or one more
            x = np.full((count, 1), sign * low, dtype)
            x[: count // 2 + more] = sign * (low + step)
            running_mean, running_var = np.zeros(1, dtype), np.ones(1, dtype)
            nf.batch_norm(x, running_mean, running_var, training=True, momentum=1.0)
            assert float(running_mean[0]) == sign * (low + more * step)
