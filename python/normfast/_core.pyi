# SPDX-License-Identifier: BSD-3-Clause
# The compiled module. Every function takes all arguments by position, in the order of the public function of its name;
# defaults and documentation live there. Checks and messages live in C++.

from typing import TypedDict

from ._typing import Array, ArrayLike, Axis, Gradient, Needs

class _Pool(TypedDict):
    limit: int
    held: int

class _Config(TypedDict):
    code_path: str
    code_paths: list[str]
    threads: int
    pool: _Pool
    compiler: str

def layer_norm(
    x: ArrayLike,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    axis: Axis,
    eps: float,
    out: Array | None,
    return_stats: bool,
    /,
) -> Array | tuple[Array, Array, Array]: ...
def layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None,
    axis: Axis,
    needs: Needs | None,
    out: Array | None,
    /,
) -> tuple[Gradient, Gradient, Gradient]: ...
def rms_norm(
    x: ArrayLike,
    weight: ArrayLike | None,
    axis: Axis,
    eps: float,
    out: Array | None,
    return_stats: bool,
    /,
) -> Array | tuple[Array, Array]: ...
def rms_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None,
    axis: Axis,
    needs: Needs | None,
    out: Array | None,
    /,
) -> tuple[Gradient, Gradient]: ...
def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    channel_axis: int,
    eps: float,
    out: Array | None,
    return_stats: bool,
    /,
) -> Array | tuple[Array, Array, Array]: ...
def group_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None,
    channel_axis: int,
    needs: Needs | None,
    out: Array | None,
    /,
) -> tuple[Gradient, Gradient, Gradient]: ...
def instance_norm(
    x: ArrayLike,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    channel_axis: int,
    eps: float,
    out: Array | None,
    return_stats: bool,
    /,
) -> Array | tuple[Array, Array, Array]: ...
def instance_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None,
    channel_axis: int,
    needs: Needs | None,
    out: Array | None,
    /,
) -> tuple[Gradient, Gradient, Gradient]: ...
def batch_norm(
    x: ArrayLike,
    running_mean: Array | None,
    running_var: Array | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    training: bool,
    momentum: float,
    decay: float | None,
    running_ddof: int,
    eps: float,
    channel_axis: int,
    out: Array | None,
    return_stats: bool,
    /,
) -> Array | tuple[Array, Array, Array]: ...
def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None,
    training: bool,
    channel_axis: int,
    needs: Needs | None,
    out: Array | None,
    /,
) -> tuple[Gradient, Gradient, Gradient]: ...
def check_num_threads(n: int, /) -> None: ...
def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def set_pool_limit(nbytes: int, /) -> None: ...
def release_pool() -> None: ...
def config() -> _Config: ...
