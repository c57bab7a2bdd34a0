"""``[model.mixers.hgrn2]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.config.section import require
from lt2titan.model.mixers.config.sizes import divisors


@dataclass(kw_only=True, slots=True)
class HGRN2Config:
    """HGRN2: S <- Diag(a) S + (1 - a) i^T with a decay a per channel (arXiv 2404.07904)."""

    n_heads: int = 16
    """Heads; each head's state is dim / n_heads square."""

    def validate(self, dim: int) -> None:
        require(self.n_heads > 0, self, "n_heads", "must be positive")
        require(dim % self.n_heads == 0, self, "n_heads", f"does not divide dim {dim}; these do: {divisors(dim)}")
