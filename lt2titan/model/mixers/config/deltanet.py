"""``[model.mixers.deltanet]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.config.section import require
from lt2titan.model.mixers.config.sizes import check_expansion


@dataclass(kw_only=True, slots=True)
class DeltaNetConfig:
    """DeltaNet: S <- (I - b k k^T) S + b k v^T, without a decay (arXiv 2406.06484)."""

    n_heads: int = 16
    """Heads of queries, keys and values."""
    expand_k: float = 1.0
    """Total key width as a multiple of dim."""
    expand_v: float = 1.0
    """Total value width as a multiple of dim."""
    conv_size: int = 4
    """Taps of the causal depthwise convolution on q, k and v."""
    allow_neg_eigval: bool = False
    """Let b reach 2, so that a transition may have negative eigenvalues (arXiv 2411.12537)."""

    def validate(self, dim: int) -> None:
        require(self.n_heads > 0, self, "n_heads", "must be positive")
        check_expansion(self, "expand_k", dim, self.n_heads)
        check_expansion(self, "expand_v", dim, self.n_heads)
        require(self.conv_size >= 2, self, "conv_size", "must be at least 2 taps")
