"""The learning rate as a function of the step: nothing to save, nothing to drift."""

from __future__ import annotations

import math


def learning_rate_factor(
    step: int, *, warmup_steps: int, total_steps: int, decay_type: str, min_lr_factor: float
) -> float:
    """Share of the peak learning rate that step 1, 2, ... is taken with.

    Linear from 1/warmup_steps to 1 at step warmup_steps, then by ``decay_type`` ("cosine", "linear", "constant") to
    ``min_lr_factor`` at total_steps, where it stays.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if decay_type == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if decay_type == "cosine" else 1 - progress
    return min_lr_factor + (1 - min_lr_factor) * remaining
