"""``[model.mixers.gdn]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.config.section import require
from lt2titan.model.mixers.config.sizes import check_expansion


@dataclass(kw_only=True, slots=True)
class GDNConfig:
    """Gated delta network: S <- a (I - b k k^T) S + b k v^T with a scalar decay a per head (arXiv 2412.06464)."""

    n_heads: int = 16
    """Heads of queries and keys."""
    n_v_heads: int = 0
    """Heads of values (grouped values), a multiple of n_heads; 0 means as many as n_heads."""
    expand_k: float = 0.75
    """Total key width as a multiple of dim."""
    expand_v: float = 1.5
    """Total value width as a multiple of dim."""
    conv_size: int = 4
    """Taps of the causal depthwise convolution on q, k and v."""
    allow_neg_eigval: bool = False
    """Let b reach 2, so that a transition may have negative eigenvalues (arXiv 2411.12537)."""

    def validate(self, dim: int) -> None:
        require(self.n_heads > 0, self, "n_heads", "must be positive")
        require(
            self.n_v_heads >= 0 and self.n_v_heads % self.n_heads == 0,
            self,
            "n_v_heads",
            f"must be 0 or a multiple of n_heads {self.n_heads}",
        )
        check_expansion(self, "expand_k", dim, self.n_heads)
        heads_field = "n_v_heads" if self.n_v_heads else "n_heads"
        check_expansion(self, "expand_v", dim, getattr(self, heads_field), heads_field)
        require(self.conv_size >= 2, self, "conv_size", "must be at least 2 taps")
