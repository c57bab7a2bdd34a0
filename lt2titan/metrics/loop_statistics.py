"""How the residual stream changes from loop to loop, summed up while training computes it."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from lt2titan.model.looped_core import LoopObserver


class LoopStatistics(LoopObserver):
    """Over all tokens (padding too) and channels of the forward passes that it observes, on all ranks.

    Sums stay on the device in fp64, whatever the number of microbatches; nothing waits until ``figures``.
    """

    def __init__(self, n_loops: int, device: torch.device) -> None:
        # Columns: squares of h(t-1), of h(t) and of h(t) - h(t-1), elements of h(t); |rho_t|, its elements.
        self._sums = torch.zeros(n_loops, 6, dtype=torch.float64, device=device)
        self._squares = self._sums[0, 0]

    def after_loop(self, loop: int, before: Tensor, after: Tensor, rho: Tensor | None) -> None:
        squares_before = _squares(before) if loop == 0 else self._squares  # a loop starts where the last one ended
        self._squares = _squares(after)
        self._sums[loop, :3] += torch.stack([squares_before, self._squares, _squares(after - before)])
        self._sums[loop, 3] += after.numel()
        if rho is not None:
            self._sums[loop, 4] += rho.double().abs().sum()
            self._sums[loop, 5] += rho.numel()

    def figures(self) -> dict[str, float]:
        """residual_rms/loop_t, relative_update/loop_t and, with a residual gate, rho/loop_t (see metrics/record.py), of
        the loops that were run.

        One all-reduce of T x 6 numbers, so all ranks must call it; waits for the device.
        """
        sums = self._sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        figures = {}
        for loop, (before, after, change, n_elements, rho, n_rho) in enumerate(sums.tolist(), start=1):
            if not n_elements:
                break
            figures[f"residual_rms/loop_{loop}"] = math.sqrt(after / n_elements)
            figures[f"relative_update/loop_{loop}"] = math.sqrt(change / before) if before else math.nan
            if n_rho:
                figures[f"rho/loop_{loop}"] = rho / n_rho
        return figures


def _squares(x: Tensor) -> Tensor:
    """Sum of squares of x (B, L, dim) as an fp64 scalar: rows in at least fp32, then their sum in fp64."""
    return (
        torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).double().square().sum()
    )
