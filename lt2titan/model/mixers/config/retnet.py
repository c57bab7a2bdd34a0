"""``[model.mixers.retnet]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.config.section import require
from lt2titan.model.mixers.config.sizes import check_expansion, divisors


@dataclass(kw_only=True, slots=True)
class RetNetConfig:
    """Retention: S <- (1 - 2^(-5-h)) S + k v^T, a constant decay for each head h (arXiv 2307.08621)."""

    n_heads: int = 16
    """Heads of queries, keys and values; head h remembers about 2^(5+h) tokens."""
    expand_k: float = 1.0
    """Total key width as a multiple of dim; RoPE needs an even width per head."""
    expand_v: float = 2.0
    """Total value width as a multiple of dim."""

    def validate(self, dim: int) -> None:
        require(self.n_heads > 0, self, "n_heads", "must be positive")
        for name in ("expand_v", "expand_k"):
            check_expansion(self, name, dim, self.n_heads)
        key_dim = round(self.expand_k * dim)
        require(
            key_dim // self.n_heads % 2 == 0,
            self,
            "n_heads",
            f"splits the width {key_dim} of expand_k into odd head widths, which RoPE cannot turn; even: "
            f"{[n for n in divisors(key_dim) if key_dim // n % 2 == 0]}",
        )
