# SPDX-License-Identifier: BSD-3-Clause

"""More than 2^31 elements: 16-bit arrays of some 4.4 GB, made on the device; parts are compared with the reference."""

from __future__ import annotations

import _device
import numpy as np
import pytest

import normfast as nf
from _checks import gradient_error

if (reason := _device.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)
if _device.REHEARSAL:
    pytest.skip("too much for the host", allow_module_level=True)

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

LIMIT = 1 << 31
HALF_ULP = 2.0**-11  # of a float16 result, beside what float32 arithmetic leaves


@pytest.fixture
def torch():
    torch = _device.open_library("torch").torch
    free, _ = torch.cuda.mem_get_info()
    if free < 28 << 30:
        pytest.skip(f"needs 28 GB of free device memory, there are {free >> 30}")
    yield torch
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def draw(torch, shape, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.empty(shape, dtype=torch.float16, device="cuda").normal_(0.3, 1.1, generator=generator)


def host(tensor):
    return tensor.double().cpu().numpy()


def close(got, want):
    """y or dx in float16: within a rounding of the exact values."""
    error = np.abs(host(got) - want)
    assert (error <= HALF_ULP * np.abs(want) * 1.001 + 2e-5).all(), error.max()


def close_sum(got, want, terms):
    assert gradient_error(got.cpu().numpy(), want, float(terms)) <= 1e-6


def sums(torch, dy, x, mean, rstd, rows=16_384):
    """dweight and dbias of layer norm in float64, block by block on the device; and the norms of their terms."""
    totals = [torch.zeros(x.shape[1], dtype=torch.float64, device="cuda") for _ in range(4)]
    for at in range(0, len(x), rows):
        part = slice(at, at + rows)
        d = dy[part].double()
        terms = d * (x[part].double() - mean[part].double()) * rstd[part].double()
        for total, term in zip(totals, (terms, d, terms**2, d**2), strict=True):
            total += term.sum(0)
    dweight, dbias = (t.cpu().numpy() for t in totals[:2])
    return dweight, dbias, *(np.sqrt(t.sum().item()) for t in totals[2:])


@pytest.mark.parametrize("width", [4096, 65_539, 128], ids=lambda w: f"layer_norm-{w}")
def test_rows(torch, width):
    rows = LIMIT // width + 5
    x, dy = draw(torch, (rows, width), 1), draw(torch, (rows, width), 2)
    weight, bias = (torch.rand(width, device="cuda") + 0.5 for _ in range(2))
    y, mean, rstd = nf.layer_norm(x, weight, bias, return_stats=True)
    edge = LIMIT // width
    parts = [slice(0, 3), slice(edge // 2 - 1, edge // 2 + 2), slice(edge - 2, edge + 2), slice(rows - 3, rows)]
    w, b = host(weight), host(bias)
    for part in parts:
        close(y[part], nf.reference.layer_norm(host(x[part]), w, b))
    del y
    dx, dweight, dbias = nf.layer_norm_backward(dy, x, mean, rstd, weight)
    for part in parts:
        arguments = host(dy[part]), host(x[part]), host(mean[part]), host(rstd[part]), w
        close(dx[part], nf.reference.layer_norm_backward(*arguments)[0])
    del dx
    want = sums(torch, dy, x, mean, rstd, max(1, (1 << 26) // width))
    close_sum(dweight, want[0], want[2])
    close_sum(dbias, want[1], want[3])


@pytest.mark.parametrize("last", [False, True], ids=["batch_norm-first", "batch_norm-last"])
def test_channels(torch, last):
    """Batch norm: each channel lies across all of the memory, or the last channels lie beyond the limit."""
    channels = 64
    samples, pixels = (LIMIT // channels // 1024 + 1, 1024)
    shape = (samples, pixels, channels) if last else (samples, channels, pixels)
    axis = -1 if last else 1
    x, dy = draw(torch, shape, 3), draw(torch, shape, 4)
    weight, bias = (torch.rand(channels, device="cuda") + 0.5 for _ in range(2))
    y, mean, rstd = nf.batch_norm(x, None, None, weight, bias, training=True, channel_axis=axis, return_stats=True)
    dx, dweight, dbias = nf.batch_norm_backward(dy, x, mean, rstd, weight, channel_axis=axis)
    for c in (0, 1, channels // 2, channels - 1):
        at = (..., slice(c, c + 1)) if last else (slice(None), slice(c, c + 1))
        own = x[at].double().reshape(-1)
        d = dy[at].double().reshape(-1)
        m, r = own.mean(), 1 / (own.var(unbiased=False) + 1e-5).sqrt()
        np.testing.assert_allclose(mean[c].item(), m.item(), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(rstd[c].item(), r.item(), rtol=1e-6)
        hat = (own - m) * r
        first, second = d.mean(), (d * hat).mean()
        edges = [slice(0, 4000), slice(len(own) // 2 - 2000, len(own) // 2 + 2000), slice(len(own) - 4000, None)]
        for part in edges:
            close(y[at].reshape(-1)[part], host(hat[part] * weight[c].double() + bias[c].double()))
            exact = r * weight[c].double() * (d[part] - first - hat[part] * second)
            close(dx[at].reshape(-1)[part], host(exact))
        close_sum(dweight[c], host((d * hat).sum()), (d * hat).square().sum().sqrt())
        close_sum(dbias[c], host(d.sum()), d.square().sum().sqrt())


def test_group_norm(torch):
    """Groups larger than the chip, the last of them beyond the limit."""
    shape, groups = (33, 32, 1024, 2049), 8
    x = draw(torch, shape, 5)
    y, mean, rstd = nf.group_norm(x, groups, return_stats=True)
    for n, g in ((0, 0), (16, 3), (32, 0), (32, 7)):
        own = x[n, 4 * g : 4 * g + 4].double()
        m, r = own.mean(), 1 / (own.var(unbiased=False) + 1e-5).sqrt()
        np.testing.assert_allclose(mean[n, g].item(), m.item(), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(rstd[n, g].item(), r.item(), rtol=1e-6)
        for c in (0, 3):
            close(y[n, 4 * g + c, -2:], host((own[c, -2:] - m) * r))


def test_strides(torch):
    """A few columns of a large array: the copy steps over more than 2^32 bytes."""
    rows = LIMIT // 4096 + 5
    x = draw(torch, (rows, 4096), 6)
    y = nf.layer_norm(x[:, 7:40:4])
    for part in (slice(0, 5), slice(rows - 5, rows)):
        close(y[part], nf.reference.layer_norm(host(x[part, 7:40:4])))
    out = torch.zeros_like(x)
    nf.rms_norm(x[:, :96], out=out[:, 4000:])
    for part in (slice(0, 5), slice(rows - 5, rows)):
        close(out[part, 4000:], nf.reference.rms_norm(host(x[part, :96])))
    assert not out[:, :4000].any()
