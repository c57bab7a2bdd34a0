"""One physical layer."""

from __future__ import annotations

from torch import Tensor, nn

from lt2titan.model.config import ModelConfig
from lt2titan.model.context import Carry, Context
from lt2titan.model.layers import RMSNorm, SwiGLU
from lt2titan.model.mixers.base import Mixer, State
from lt2titan.model.mixers.registry import build_mixer
from lt2titan.model.recompute import Contexts, recomputed


class Block(nn.Module):
    """h + Mixer(norm(h)), then h + SwiGLU(norm(h)). A block knows nothing of loops: the loop's window and the decode
    state of this visit come with the call."""

    def __init__(self, config: ModelConfig, mixer: str, is_first: bool, backend: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer: Mixer = build_mixer(mixer, config, is_first, backend)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = SwiGLU(config.dim, config.ffn_width)

    def forward(
        self, h: Tensor, context: Context, carry: Carry, state: State | None = None, recompute: Contexts | None = None
    ) -> tuple[Tensor, Carry]:
        """h (B, L, dim) -> (B, L, dim). With ``recompute``, what its contexts do not keep is computed again in the
        backward pass."""
        if recompute is not None:
            return recomputed(self._residuals, h, context, carry, recompute)
        return self._residuals(h, context, carry, state)

    def _residuals(self, h: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        y, carry = self.mixer(self.mixer_norm(h), context, carry, state)
        h = h + y
        return h + self.ffn(self.ffn_norm(h)), carry
