"""The learning rate against torch's own schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from lt2titan.optim.schedule import learning_rate_factor

WARMUP, TOTAL, FLOOR = 5, 25, 0.1


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
def test_follows_torch(decay_type: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    n_decay = TOTAL - WARMUP
    decay = (
        CosineAnnealingLR(optimizer, n_decay, eta_min=FLOOR)
        if decay_type == "cosine"
        else LinearLR(optimizer, 1.0, FLOOR, n_decay)
    )
    torch_schedule = SequentialLR(optimizer, [LinearLR(optimizer, 1 / WARMUP, 1.0, WARMUP - 1), decay], [WARMUP - 1])
    for step in range(1, TOTAL + 1):
        ours = learning_rate_factor(
            step, warmup_steps=WARMUP, total_steps=TOTAL, decay_type=decay_type, min_lr_factor=FLOOR
        )
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        torch_schedule.step()


@pytest.mark.parametrize("decay_type", ["cosine", "linear", "constant"])
def test_ends(decay_type: str) -> None:
    def factor(step: int, warmup: int = WARMUP) -> float:
        return learning_rate_factor(
            step, warmup_steps=warmup, total_steps=TOTAL, decay_type=decay_type, min_lr_factor=FLOOR
        )

    assert factor(1) == 1 / WARMUP and factor(WARMUP) == 1.0
    last = 1.0 if decay_type == "constant" else FLOOR
    assert factor(TOTAL) == pytest.approx(last) and factor(10 * TOTAL) == pytest.approx(last)
    assert factor(TOTAL, warmup=TOTAL) == 1.0  # all warm-up
    assert 0 < factor(1, warmup=0) <= 1.0
