"""``[optimizer]`` and ``[lr_scheduler]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lt2titan.config.section import require


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW. Norms, rho, A_log, dt_bias and embeddings are never decayed."""

    name: Literal["AdamW"] = "AdamW"
    """Optimizer; AdamW (fused) is the only one."""
    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""

    def validate(self) -> None:
        require(self.lr > 0, self, "lr", "must be positive")
        require(0 <= self.beta1 < 1, self, "beta1", "must be in [0, 1)")
        require(0 <= self.beta2 < 1, self, "beta2", "must be in [0, 1)")
        require(self.eps > 0, self, "eps", "must be positive")
        require(self.weight_decay >= 0, self, "weight_decay", "must not be negative")


@dataclass(kw_only=True, slots=True)
class LRSchedulerConfig:
    """Linear warm-up, then decay over a horizon of its own."""

    warmup_steps: int = 200
    """Steps over which the learning rate rises linearly to its peak."""
    total_steps: int = 0
    """Horizon of the schedule; 0 means training.steps. Set it to stop early or to extend without bending the curve."""
    decay_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    min_lr_factor: float = 0.0
    """Final learning rate as a share of the peak."""

    def validate(self) -> None:
        require(self.warmup_steps >= 0, self, "warmup_steps", "must not be negative")
        require(self.total_steps >= 0, self, "total_steps", "must be positive, or 0 for training.steps")
        require(0 <= self.min_lr_factor <= 1, self, "min_lr_factor", "must be in [0, 1]")
