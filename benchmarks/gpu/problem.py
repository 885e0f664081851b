# SPDX-License-Identifier: BSD-3-Clause

"""The arrays of a cell, in rotating sets that together exceed twice the L2 cache, and normfast's calls on them."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, nan
from typing import Any

import torch

import normfast as nf

from .cases import Case

MOST_SETS = 96


class Problem:
    """Inputs, statistics and outputs of one case; `sets` copies of what is as large as x."""

    def __init__(self, case: Case, device: str, l2_bytes: int) -> None:
        self.case, self.device = case, device
        inputs = case.nbytes * (2 if case.backward else 1)
        self.sets = max(2, min(MOST_SETS, ceil(2.2 * l2_bytes / inputs)))
        self.dtype = getattr(torch, case.dtype)
        first = self._draw(0.7, 1.3)
        self.x = self._rotate(first)
        # Memory is handed out again: without this, what a kernel left unwritten could hold an earlier right result.
        self.out = [torch.full_like(first, nan) for _ in range(self.sets)]
        self.dy = self._rotate(self._draw(0.05, 1.0)) if case.backward else []
        n = case.channels
        # Batch norm has float32 parameters beside 16-bit activations, as in training with mixed precision.
        params = torch.float32 if case.op == "batch_norm" else self.dtype
        self.weight = (1 + 0.3 * torch.randn(n, device=device)).to(params)
        self.bias = (0.1 + 0.3 * torch.randn(n, device=device)).to(params) if case.center else None
        self.running = None
        if case.op == "batch_norm" and not case.backward:
            self.running = torch.zeros(n, device=device), torch.ones(n, device=device)
        self.stats: list[tuple[Any, ...]] = []
        if case.backward:
            self.stats = [self.forward(x, stats=True)[1:] for x in self.x]

    def _draw(self, mean: float, std: float) -> torch.Tensor:
        x = torch.empty(self.case.shape, dtype=self.dtype, device=self.device)
        if self.case.last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.normal_(mean, std)

    def _rotate(self, first: torch.Tensor) -> list[torch.Tensor]:
        """Different data in every set, at little cost."""
        others = [torch.empty_like(first) for _ in range(self.sets - 1)]
        for number, other in enumerate(others):
            torch.mul(first, 1.0 + 0.01 * (number + 1) / self.sets, out=other)
        return [first, *others]

    # ---- normfast

    def forward(self, x: Any, *, out: Any = None, stats: bool = False) -> Any:
        case, kw = self.case, {"out": out, "return_stats": stats}
        if case.op == "layer_norm":
            return nf.layer_norm(x, self.weight, self.bias, **kw)
        if case.op == "rms_norm":
            return nf.rms_norm(x, self.weight, **kw)
        if case.op == "group_norm":
            return nf.group_norm(x, case.groups, self.weight, self.bias, **kw)
        if case.op == "instance_norm":
            return nf.instance_norm(x, self.weight, self.bias, **kw)
        running = self.running or (None, None)
        return nf.batch_norm(x, *running, self.weight, self.bias, training=True, **kw)

    def backward(self, i: int, *, out: Any = None) -> tuple[Any, ...]:
        function = getattr(nf, self.case.op + "_backward")
        needs = ("x",) if self.case.step == "dx" else None
        return function(self.dy[i], self.x[i], *self.stats[i], self.weight, needs=needs, out=out)

    def normfast(self) -> Callable[[int], Any]:
        """A call on set i."""
        if self.case.backward:
            return lambda i: self.backward(i, out=self.out[i])
        if self.case.step == "stats":
            return lambda i: self.forward(self.x[i], out=self.out[i], stats=True)
        return lambda i: self.forward(self.x[i], out=self.out[i])
