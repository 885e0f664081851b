# SPDX-License-Identifier: BSD-3-Clause

"""Arrays on a CUDA device, for those who have no library of such arrays.

Arrays of CuPy, PyTorch, JAX and Numba go straight to the functions of normfast and need nothing from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from ._typing import ArrayLike

__all__ = ["DeviceArray", "synchronize", "to_device"]

if TYPE_CHECKING:
    from ._cuda import DeviceArray
else:
    try:
        from ._cuda import DeviceArray
    except ModuleNotFoundError:

        class DeviceArray:
            """An array on a CUDA device. This build of normfast can make none."""

            def __new__(cls, *args, **kwargs):
                _refuse("DeviceArray")


def to_device(x: ArrayLike, device: int | None = None) -> DeviceArray:
    """Copy an array to a CUDA device.

    Parameters
    ----------
    x : array_like
        float16, bfloat16 (``ml_dtypes``), float32, float64, integer or bool. It keeps its memory order where it is a
        permuted contiguous array, else it comes in C order.
    device : int, optional
        The number of the device. Default: the current one.

    Returns
    -------
    DeviceArray
        With ``shape``, ``dtype``, ``ndim``, ``size``, ``nbytes``, ``strides``, ``device`` and ``numpy()``, which
        copies back to the host. It also has ``__dlpack__`` and ``__cuda_array_interface__``. The functions of
        normfast take it and then return such arrays.

    Raises
    ------
    RuntimeError
        If there is no device, or normfast was built without CUDA.
    TypeError
        If `x` has another dtype, or is on a device already.
    ValueError
        If there is no device of this number.
    MemoryError
        If the device has no room for it.

    Examples
    --------
    >>> import numpy as np
    >>> import normfast as nf
    >>> x = nf.cuda.to_device(np.ones((2, 3), np.float32))  # doctest: +SKIP
    >>> nf.layer_norm(x).numpy()  # doctest: +SKIP
    array([[0., 0., 0.],
           [0., 0., 0.]], dtype=float32)
    """
    try:
        from ._cuda import to_device as copy
    except ModuleNotFoundError:
        _refuse("to_device")
    return copy(x, device)


def synchronize() -> None:
    """Wait until all work on the current CUDA device is done.

    Raises
    ------
    RuntimeError
        If there is no device, or normfast was built without CUDA, or the work failed.
    """
    try:
        from ._cuda import synchronize as wait
    except ModuleNotFoundError:
        _refuse("synchronize")
    wait()


def _refuse(function: str) -> NoReturn:
    message = f"{function}: this build of normfast has no CUDA backend; build normfast with NORMFAST_CUDA=ON"
    raise RuntimeError(message) from None
