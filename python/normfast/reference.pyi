# SPDX-License-Identifier: BSD-3-Clause

# reference.py is written to be read, so its types stand here.

from typing import Any

from ._typing import Array, ArrayLike, Axis, Needs

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]

def layer_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    out: Array | None = None,
    return_stats: bool = False,
) -> Any: ...
def layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    needs: Needs | None = None,
    out: Array | None = None,
) -> Any: ...
def rms_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-6,
    out: Array | None = None,
    return_stats: bool = False,
) -> Any: ...
def rms_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    needs: Needs | None = None,
    out: Array | None = None,
) -> Any: ...
def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    return_stats: bool = False,
) -> Any: ...
def group_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    needs: Needs | None = None,
    out: Array | None = None,
) -> Any: ...
def instance_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    return_stats: bool = False,
) -> Any: ...
def instance_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    channel_axis: int = 1,
    needs: Needs | None = None,
    out: Array | None = None,
) -> Any: ...
def batch_norm(
    x: ArrayLike,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    decay: float | None = None,
    running_ddof: int = 1,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: Array | None = None,
    return_stats: bool = False,
) -> Any: ...
def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    training: bool = True,
    channel_axis: int = 1,
    needs: Needs | None = None,
    out: Array | None = None,
) -> Any: ...
