"""``[model.mixers.mamba2]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.config.section import require
from lt2titan.model.mixers.config.sizes import check_expansion, divisors


@dataclass(kw_only=True, slots=True)
class Mamba2Config:
    """Mamba-2: S <- a S + B (dt x)^T with a scalar decay a per head, read by C (arXiv 2405.21060)."""

    n_heads: int = 16
    """Heads; each expand * dim / n_heads wide."""
    n_groups: int = 1
    """Sets of B and C, each read by n_heads / n_groups consecutive heads; the output norm works per group."""
    expand: float = 2.0
    """Inner width as a multiple of dim."""
    state_size: int = 64
    """Width of B and C: every head's state is state_size times its width."""
    conv_size: int = 4
    """Taps of the causal depthwise convolution, with bias, on x, B and C."""

    def validate(self, dim: int) -> None:
        for name in ("n_heads", "n_groups", "state_size"):
            require(getattr(self, name) > 0, self, name, "must be positive")
        check_expansion(self, "expand", dim, self.n_heads)
        require(
            self.n_heads % self.n_groups == 0,
            self,
            "n_groups",
            f"does not divide n_heads {self.n_heads}; these do: {divisors(self.n_heads)}",
        )
        require(self.conv_size >= 2, self, "conv_size", "must be at least 2 taps")
