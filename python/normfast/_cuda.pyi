# SPDX-License-Identifier: BSD-3-Clause
# The compiled module for arrays on a CUDA device; not in every build. The norms are those of _core, one by one, but
# for arrays of any library, and return arrays of the library of x.

from typing import Any, TypedDict, final

from numpy import dtype

from ._typing import Array, ArrayLike, Axis, Needs

class _Device(TypedDict):
    name: str
    compute_capability: str

class _Config(TypedDict):
    toolkit: str
    architectures: list[str]
    devices: list[_Device]
    reason: str | None

@final
class DeviceArray:
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> dtype[Any]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def device(self) -> str: ...
    def numpy(self) -> Array: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def layer_norm(
    x: Any,
    weight: Any,
    bias: Any,
    axis: Axis,
    eps: float,
    out: Any,
    return_stats: bool,
    /,
) -> Any: ...
def layer_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    axis: Axis,
    needs: Needs | None,
    out: Any,
    /,
) -> tuple[Any, Any, Any]: ...
def rms_norm(
    x: Any,
    weight: Any,
    axis: Axis,
    eps: float,
    out: Any,
    return_stats: bool,
    /,
) -> Any: ...
def rms_norm_backward(
    dy: Any,
    x: Any,
    rstd: Any,
    weight: Any,
    axis: Axis,
    needs: Needs | None,
    out: Any,
    /,
) -> tuple[Any, Any]: ...
def group_norm(
    x: Any,
    num_groups: int,
    weight: Any,
    bias: Any,
    channel_axis: int,
    eps: float,
    out: Any,
    return_stats: bool,
    /,
) -> Any: ...
def group_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    channel_axis: int,
    needs: Needs | None,
    out: Any,
    /,
) -> tuple[Any, Any, Any]: ...
def instance_norm(
    x: Any,
    weight: Any,
    bias: Any,
    channel_axis: int,
    eps: float,
    out: Any,
    return_stats: bool,
    /,
) -> Any: ...
def instance_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    channel_axis: int,
    needs: Needs | None,
    out: Any,
    /,
) -> tuple[Any, Any, Any]: ...
def batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: bool,
    momentum: float,
    decay: float | None,
    running_ddof: int,
    eps: float,
    channel_axis: int,
    out: Any,
    return_stats: bool,
    /,
) -> Any: ...
def batch_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    training: bool,
    channel_axis: int,
    needs: Needs | None,
    out: Any,
    /,
) -> tuple[Any, Any, Any]: ...
def to_device(x: ArrayLike, device: int | None, /) -> DeviceArray: ...
def synchronize() -> None: ...
def config() -> _Config: ...
