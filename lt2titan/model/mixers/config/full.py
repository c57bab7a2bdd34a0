"""``[model.mixers.full]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.model.mixers.config.sizes import check_heads


@dataclass(kw_only=True, slots=True)
class FullConfig:
    """Softmax attention over all earlier tokens."""

    n_heads: int = 16
    """Heads of the queries; must split dim."""
    n_kv_heads: int = 0
    """Key and value heads (grouped-query attention); 0 means as many as n_heads."""
    output_gate: bool = False
    """Multiply the attention output by sigmoid(W_g x), W_g zero-initialised, before the output projection."""

    def validate(self, dim: int) -> None:
        check_heads(self, dim)
