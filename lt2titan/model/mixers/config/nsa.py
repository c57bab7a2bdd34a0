"""``[model.mixers.nsa]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.config.section import require
from lt2titan.model.mixers.config.sizes import check_heads


@dataclass(kw_only=True, slots=True)
class NSAConfig:
    """Native sparse attention: means of key blocks, the few blocks that matter most, and a window, each gated."""

    n_heads: int = 16
    """Heads of the queries; must split dim. All that share a key head look at the same blocks."""
    n_kv_heads: int = 1
    """Key and value heads; 0 means as many as n_heads. A GPU collects keys for all heads that share them at once and
    pads fewer than 16 to 16: with 16 query heads for each key head nothing is wasted."""
    block_size: int = 64
    """Tokens of a block. On a GPU 16, 32, 64 or 128."""
    n_blocks: int = 16
    """Blocks that a token looks at whole; the first, its own and the one before it are always among them."""
    window: int = 512
    """Keys a token sees in the sliding branch, itself included. model.loop.windows does not change it."""

    def validate(self, dim: int) -> None:
        check_heads(self, dim)
        require(self.block_size > 0, self, "block_size", "must be positive")
        require(self.n_blocks >= 3, self, "n_blocks", "must be at least 3: the first, a token's own and the previous")
        require(self.window > 0, self, "window", "must be positive (the token itself counts)")
