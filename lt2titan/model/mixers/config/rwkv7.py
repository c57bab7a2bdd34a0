"""``[model.mixers.rwkv7]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.config.section import require
from lt2titan.model.mixers.config.sizes import divisors

_PER_ROOT = {"decay_rank": 2.5, "a_rank": 2.5, "v_rank": 1.7, "gate_rank": 5.0}
"""Ranks grow with the square root of dim."""


@dataclass(kw_only=True, slots=True)
class RWKV7Config:
    """RWKV-7: S <- (Diag(w) - k' (a k')^T) S + k v^T with token shift and first values (arXiv 2503.14456)."""

    head_dim: int = 64
    """Width of a head; must divide dim."""
    decay_rank: int = 0
    """Rank of the decay's low-rank map; 0 is 2.5 sqrt(dim) to the nearest multiple of 32 (64 at dim 1024)."""
    a_rank: int = 0
    """Rank of the in-context learning rate's map; 0 as decay_rank."""
    v_rank: int = 0
    """Rank of the map that mixes in the first values; 0 is 1.7 sqrt(dim), rounded likewise (64 at dim 1024)."""
    gate_rank: int = 0
    """Rank of the output gate's map; 0 is 5 sqrt(dim), rounded likewise (160 at dim 1024)."""

    def rank(self, field: str, dim: int) -> int:
        """``field``, or what 0 stands for at this width."""
        return getattr(self, field) or max(32, round(_PER_ROOT[field] * dim**0.5 / 32) * 32)

    def validate(self, dim: int) -> None:
        require(
            self.head_dim > 0 and dim % self.head_dim == 0,
            self,
            "head_dim",
            f"does not divide dim {dim}; these do: {divisors(dim)}",
        )
        for field in _PER_ROOT:
            require(getattr(self, field) >= 0, self, field, "must be 0 (derived from dim) or positive")
