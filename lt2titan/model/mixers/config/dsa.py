"""``[model.mixers.dsa]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.config.section import require
from lt2titan.model.mixers.config.sizes import check_heads


@dataclass(kw_only=True, slots=True)
class DSAConfig:
    """DeepSeek Sparse Attention: a small indexer scores all earlier tokens, and attention sees the best of them
    (DeepSeek-V3.2, arXiv 2512.02556). The indexer learns by a loss of its own."""

    n_heads: int = 16
    """Heads of the queries; must split dim."""
    n_kv_heads: int = 1
    """Key and value heads; 0 means as many as n_heads. One is the fastest: what is gathered serves all query heads.
    Tensor-parallel ranks that cannot split them evenly all have them whole, and split query heads only."""
    output_gate: bool = False
    """Multiply the attention output by sigmoid(W_g x), W_g zero-initialised, before the output projection."""
    top_k: int = 2048
    """Tokens that attention sees, chosen for all heads alike. Rows no longer than this are attended to as a whole."""
    n_index_heads: int = 8
    """Heads of the indexer; they share one key."""
    index_head_dim: int = 64
    """Width of the indexer's heads; even, because they are rotated (RoPE)."""
    forced_first: bool = False
    """Always see the document's first token."""
    forced_local: int = 0
    """Always see so many of the last tokens, the token itself included."""
    reuse_every: int = 1
    """Choose tokens in one of so many loops; the loops after it see the same ones, and the indexer learns in those that
    choose. Each layer's choice is then kept through the loops: 4 bytes for each token and each of its top_k."""
    warmup_steps: int = 1000
    """Training steps, from the first on, in which attention sees all earlier tokens and the indexer learns from all of
    them; after that both see the chosen ones only."""
    kl_weight: float = 1.0
    """Weight of the indexer's loss: the KL divergence of its softmax from the attention distribution, nats per token,
    summed over layers and loops. It reaches the indexer's weights only, and no other loss does."""

    def validate(self, dim: int) -> None:
        check_heads(self, dim)
        for name in ("top_k", "n_index_heads", "index_head_dim", "reuse_every"):
            require(getattr(self, name) > 0, self, name, "must be positive")
        require(self.index_head_dim % 2 == 0, self, "index_head_dim", "must be even (RoPE turns pairs of channels)")
        for name in ("forced_local", "warmup_steps", "kl_weight"):
            require(getattr(self, name) >= 0, self, name, "must not be negative")
        n_forced = self.forced_local + self.forced_first
        reason = f"must hold the {n_forced} tokens that forced_first and forced_local ask for; raise it, or lower those"
        require(self.top_k >= n_forced, self, "top_k", reason)
