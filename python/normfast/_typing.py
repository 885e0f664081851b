# SPDX-License-Identifier: BSD-3-Clause

"""Names for the types in the signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
ArrayLike: TypeAlias = npt.ArrayLike

# What np.mean takes as axis, None aside.
Axis: TypeAlias = int | tuple[int, ...]

# The gradients that a backward function can be asked for.
Needs: TypeAlias = Sequence[Literal["x", "weight", "bias"]]

# An array, or None where needs leaves it out. The caller knows which; "| Any" spares an assertion at every use.
Gradient: TypeAlias = npt.NDArray[Any] | Any

__all__ = ["Array", "ArrayLike", "Axis", "Gradient", "Needs"]
