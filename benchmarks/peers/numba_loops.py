"""The loops behind `numba_`. One pass per statistic, one to write; sums in the dtype of the data, as is usual.

Where a sum runs along the rows, every thread has a partial sum of its own: ``parts`` is the number of threads.

Shapes: rows ``(M, N)``; images ``(N, C, S)``; channels last ``(R, C)``; groups ``(N, G, C/G, S)`` and, channels last,
``(N, S, G, C/G)``.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

_loop = njit(parallel=True, fastmath=True, cache=True)


@_loop
def layer_norm(x, w, b, eps, y):
    for i in prange(x.shape[0]):
        n = x.shape[1]
        total = x.dtype.type(0)
        for j in range(n):
            total += x[i, j]
        mean = total / n
        square = x.dtype.type(0)
        for j in range(n):
            square += (x[i, j] - mean) ** 2
        rstd = 1 / np.sqrt(square / n + eps)
        for j in range(n):
            y[i, j] = (x[i, j] - mean) * rstd * w[j] + b[j]


@_loop
def rms_norm(x, w, eps, y):
    for i in prange(x.shape[0]):
        n = x.shape[1]
        square = x.dtype.type(0)
        for j in range(n):
            square += x[i, j] * x[i, j]
        rstd = 1 / np.sqrt(square / n + eps)
        for j in range(n):
            y[i, j] = x[i, j] * rstd * w[j]


@_loop
def layer_norm_middle(x, w, b, eps, y):
    for i in prange(x.shape[0]):
        channels, cells = x.shape[1:]
        mean = np.zeros(cells, x.dtype)
        rstd = np.zeros(cells, x.dtype)
        for c in range(channels):
            for s in range(cells):
                mean[s] += x[i, c, s]
        mean /= channels
        for c in range(channels):
            for s in range(cells):
                rstd[s] += (x[i, c, s] - mean[s]) ** 2
        for s in range(cells):
            rstd[s] = 1 / np.sqrt(rstd[s] / channels + eps)
        for c in range(channels):
            for s in range(cells):
                y[i, c, s] = (x[i, c, s] - mean[s]) * rstd[s] * w[c] + b[c]


@_loop
def layer_norm_backward(parts, dy, x, mean, rstd, w, dx, dw, db):
    m, n = x.shape
    dw_part = np.zeros((parts, n), x.dtype)
    db_part = np.zeros((parts, n), x.dtype)
    for p in prange(parts):
        for i in range(p * m // parts, (p + 1) * m // parts):
            c1 = x.dtype.type(0)
            c2 = x.dtype.type(0)
            for j in range(n):
                g = dy[i, j] * w[j]
                xhat = (x[i, j] - mean[i]) * rstd[i]
                c1 += g
                c2 += g * xhat
                dw_part[p, j] += dy[i, j] * xhat
                db_part[p, j] += dy[i, j]
            c1 /= n
            c2 /= n
            for j in range(n):
                xhat = (x[i, j] - mean[i]) * rstd[i]
                dx[i, j] = rstd[i] * (dy[i, j] * w[j] - c1 - xhat * c2)
    dw[:] = dw_part.sum(0)
    db[:] = db_part.sum(0)


@_loop
def rms_norm_backward(parts, dy, x, rstd, w, dx, dw):
    m, n = x.shape
    dw_part = np.zeros((parts, n), x.dtype)
    for p in prange(parts):
        for i in range(p * m // parts, (p + 1) * m // parts):
            c2 = x.dtype.type(0)
            for j in range(n):
                xhat = x[i, j] * rstd[i]
                c2 += dy[i, j] * w[j] * xhat
                dw_part[p, j] += dy[i, j] * xhat
            c2 /= n
            for j in range(n):
                dx[i, j] = rstd[i] * (dy[i, j] * w[j] - x[i, j] * rstd[i] * c2)
    dw[:] = dw_part.sum(0)


@_loop
def layer_norm_backward_x(dy, x, mean, rstd, w, dx):
    m, n = x.shape
    for i in prange(m):
        c1 = x.dtype.type(0)
        c2 = x.dtype.type(0)
        for j in range(n):
            g = dy[i, j] * w[j]
            c1 += g
            c2 += g * (x[i, j] - mean[i]) * rstd[i]
        c1 /= n
        c2 /= n
        for j in range(n):
            xhat = (x[i, j] - mean[i]) * rstd[i]
            dx[i, j] = rstd[i] * (dy[i, j] * w[j] - c1 - xhat * c2)


@_loop
def rms_norm_backward_x(dy, x, rstd, w, dx):
    m, n = x.shape
    for i in prange(m):
        c2 = x.dtype.type(0)
        for j in range(n):
            c2 += dy[i, j] * w[j] * x[i, j] * rstd[i]
        c2 /= n
        for j in range(n):
            dx[i, j] = rstd[i] * (dy[i, j] * w[j] - x[i, j] * rstd[i] * c2)


@_loop
def layer_norm_backward_middle(parts, dy, x, mean, rstd, w, dx, dw, db):
    samples, channels, cells = x.shape
    dw_part = np.zeros((parts, channels), x.dtype)
    db_part = np.zeros((parts, channels), x.dtype)
    for p in prange(parts):
        c1 = np.zeros(cells, x.dtype)
        c2 = np.zeros(cells, x.dtype)
        for i in range(p * samples // parts, (p + 1) * samples // parts):
            c1[:] = 0
            c2[:] = 0
            for c in range(channels):
                for s in range(cells):
                    xhat = (x[i, c, s] - mean[i, s]) * rstd[i, s]
                    c1[s] += dy[i, c, s] * w[c]
                    c2[s] += dy[i, c, s] * w[c] * xhat
                    dw_part[p, c] += dy[i, c, s] * xhat
                    db_part[p, c] += dy[i, c, s]
            for c in range(channels):
                for s in range(cells):
                    xhat = (x[i, c, s] - mean[i, s]) * rstd[i, s]
                    dx[i, c, s] = rstd[i, s] * (dy[i, c, s] * w[c] - (c1[s] + xhat * c2[s]) / channels)
    dw[:] = dw_part.sum(0)
    db[:] = db_part.sum(0)


@_loop
def batch_norm(x, w, b, eps, y):
    samples, channels, cells = x.shape
    n = samples * cells
    for c in prange(channels):
        total = x.dtype.type(0)
        for i in range(samples):
            for s in range(cells):
                total += x[i, c, s]
        mean = total / n
        square = x.dtype.type(0)
        for i in range(samples):
            for s in range(cells):
                square += (x[i, c, s] - mean) ** 2
        rstd = 1 / np.sqrt(square / n + eps)
        for i in range(samples):
            for s in range(cells):
                y[i, c, s] = (x[i, c, s] - mean) * rstd * w[c] + b[c]


@_loop
def batch_norm_eval(x, mean, var, w, b, eps, y):
    for k in prange(x.shape[0] * x.shape[1]):
        i = k // x.shape[1]
        c = k % x.shape[1]
        rstd = 1 / np.sqrt(var[c] + eps)
        for s in range(x.shape[2]):
            y[i, c, s] = (x[i, c, s] - mean[c]) * rstd * w[c] + b[c]


@_loop
def batch_norm_backward(dy, x, mean, rstd, w, dx, dw, db):
    samples, channels, cells = x.shape
    n = samples * cells
    for c in prange(channels):
        s1 = x.dtype.type(0)
        s2 = x.dtype.type(0)
        for i in range(samples):
            for s in range(cells):
                s1 += dy[i, c, s]
                s2 += dy[i, c, s] * (x[i, c, s] - mean[c]) * rstd[c]
        dw[c] = s2
        db[c] = s1
        for i in range(samples):
            for s in range(cells):
                xhat = (x[i, c, s] - mean[c]) * rstd[c]
                dx[i, c, s] = rstd[c] * w[c] * (dy[i, c, s] - s1 / n - xhat * (s2 / n))


@_loop
def batch_norm_last(parts, x, w, b, eps, y):
    rows, channels = x.shape
    part = np.zeros((parts, channels), x.dtype)
    for p in prange(parts):
        for r in range(p * rows // parts, (p + 1) * rows // parts):
            for c in range(channels):
                part[p, c] += x[r, c]
    mean = part.sum(0) / rows
    part[:] = 0
    for p in prange(parts):
        for r in range(p * rows // parts, (p + 1) * rows // parts):
            for c in range(channels):
                part[p, c] += (x[r, c] - mean[c]) ** 2
    rstd = 1 / np.sqrt(part.sum(0) / rows + eps)
    for r in prange(rows):
        for c in range(channels):
            y[r, c] = (x[r, c] - mean[c]) * rstd[c] * w[c] + b[c]


@_loop
def batch_norm_eval_last(x, mean, var, w, b, eps, y):
    rstd = 1 / np.sqrt(var + eps)
    for r in prange(x.shape[0]):
        for c in range(x.shape[1]):
            y[r, c] = (x[r, c] - mean[c]) * rstd[c] * w[c] + b[c]


@_loop
def batch_norm_backward_last(parts, dy, x, mean, rstd, w, dx, dw, db):
    rows, channels = x.shape
    s1 = np.zeros((parts, channels), x.dtype)
    s2 = np.zeros((parts, channels), x.dtype)
    for p in prange(parts):
        for r in range(p * rows // parts, (p + 1) * rows // parts):
            for c in range(channels):
                s1[p, c] += dy[r, c]
                s2[p, c] += dy[r, c] * (x[r, c] - mean[c]) * rstd[c]
    db[:] = s1.sum(0)
    dw[:] = s2.sum(0)
    k1 = db / rows
    k2 = dw / rows
    for r in prange(rows):
        for c in range(channels):
            dx[r, c] = rstd[c] * w[c] * (dy[r, c] - k1[c] - (x[r, c] - mean[c]) * rstd[c] * k2[c])


@_loop
def group_norm(x, w, b, eps, y):
    samples, groups, width, cells = x.shape
    n = width * cells
    for k in prange(samples * groups):
        i = k // groups
        g = k % groups
        total = x.dtype.type(0)
        for c in range(width):
            for s in range(cells):
                total += x[i, g, c, s]
        mean = total / n
        square = x.dtype.type(0)
        for c in range(width):
            for s in range(cells):
                square += (x[i, g, c, s] - mean) ** 2
        rstd = 1 / np.sqrt(square / n + eps)
        for c in range(width):
            for s in range(cells):
                y[i, g, c, s] = (x[i, g, c, s] - mean) * rstd * w[g * width + c] + b[g * width + c]


@_loop
def group_norm_backward(dy, x, mean, rstd, w, dx, dw, db):
    samples, groups, width, cells = x.shape
    n = width * cells
    dw_part = np.zeros((samples, groups * width), x.dtype)
    db_part = np.zeros((samples, groups * width), x.dtype)
    for k in prange(samples * groups):
        i = k // groups
        g = k % groups
        c1 = x.dtype.type(0)
        c2 = x.dtype.type(0)
        for c in range(width):
            s1 = x.dtype.type(0)
            s2 = x.dtype.type(0)
            for s in range(cells):
                s1 += dy[i, g, c, s]
                s2 += dy[i, g, c, s] * (x[i, g, c, s] - mean[i, g]) * rstd[i, g]
            dw_part[i, g * width + c] = s2
            db_part[i, g * width + c] = s1
            c1 += s1 * w[g * width + c]
            c2 += s2 * w[g * width + c]
        c1 /= n
        c2 /= n
        for c in range(width):
            for s in range(cells):
                xhat = (x[i, g, c, s] - mean[i, g]) * rstd[i, g]
                dx[i, g, c, s] = rstd[i, g] * (dy[i, g, c, s] * w[g * width + c] - c1 - xhat * c2)
    dw[:] = dw_part.sum(0)
    db[:] = db_part.sum(0)


@_loop
def group_norm_last(x, w, b, eps, y):
    samples, cells, groups, width = x.shape
    n = width * cells
    for k in prange(samples * groups):
        i = k // groups
        g = k % groups
        total = x.dtype.type(0)
        for s in range(cells):
            for c in range(width):
                total += x[i, s, g, c]
        mean = total / n
        square = x.dtype.type(0)
        for s in range(cells):
            for c in range(width):
                square += (x[i, s, g, c] - mean) ** 2
        rstd = 1 / np.sqrt(square / n + eps)
        for s in range(cells):
            for c in range(width):
                y[i, s, g, c] = (x[i, s, g, c] - mean) * rstd * w[g * width + c] + b[g * width + c]


@_loop
def group_norm_backward_last(dy, x, mean, rstd, w, dx, dw, db):
    samples, cells, groups, width = x.shape
    n = width * cells
    dw_part = np.zeros((samples, groups * width), x.dtype)
    db_part = np.zeros((samples, groups * width), x.dtype)
    for k in prange(samples * groups):
        i = k // groups
        g = k % groups
        for s in range(cells):
            for c in range(width):
                db_part[i, g * width + c] += dy[i, s, g, c]
                dw_part[i, g * width + c] += dy[i, s, g, c] * (x[i, s, g, c] - mean[i, g]) * rstd[i, g]
        c1 = x.dtype.type(0)
        c2 = x.dtype.type(0)
        for c in range(g * width, (g + 1) * width):
            c1 += db_part[i, c] * w[c]
            c2 += dw_part[i, c] * w[c]
        c1 /= n
        c2 /= n
        for s in range(cells):
            for c in range(width):
                xhat = (x[i, s, g, c] - mean[i, g]) * rstd[i, g]
                dx[i, s, g, c] = rstd[i, g] * (dy[i, s, g, c] * w[g * width + c] - c1 - xhat * c2)
    dw[:] = dw_part.sum(0)
    db[:] = db_part.sum(0)


WITH_PARTS = (
    layer_norm_backward,
    layer_norm_backward_middle,
    rms_norm_backward,
    batch_norm_last,
    batch_norm_backward_last,
)
WITHOUT_PARAMETERS = (layer_norm_backward_x, rms_norm_backward_x)
