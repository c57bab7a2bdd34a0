"""``[model.mixers.gla]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.config.section import require
from lt2titan.model.mixers.config.sizes import check_expansion


@dataclass(kw_only=True, slots=True)
class GLAConfig:
    """Gated linear attention: S <- Diag(a) S + k v^T with a decay a per key channel (arXiv 2312.06635)."""

    n_heads: int = 4
    """Heads; few and wide, as in the paper at every scale."""
    expand_k: float = 0.5
    """Total key width as a multiple of dim."""
    expand_v: float = 1.0
    """Total value width as a multiple of dim."""
    decay_rank: int = 16
    """Inner width of the low-rank map from inputs to decays."""
    decay_temperature: float = 16.0
    """Divides the logarithm of the decay: the larger, the closer to 1."""

    def validate(self, dim: int) -> None:
        for name in ("n_heads", "decay_rank", "decay_temperature"):
            require(getattr(self, name) > 0, self, name, "must be positive")
        check_expansion(self, "expand_k", dim, self.n_heads)
        check_expansion(self, "expand_v", dim, self.n_heads)
