"""What every block of a forward pass shares: where the tokens stand, and which of them may see each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lt2titan.kernels.nsa.layout import BlockLayout
from lt2titan.model.stretch import Stretch

Carry = dict[str, Tensor]
"""Tensors that flow from layer to layer and loop to loop beside the hidden states; empty for most mixers."""


@dataclass(frozen=True)
class Context:
    """Positions and document boundaries of the tokens in a forward pass.

    positions: (B, L) int64, each token's place in its document.
    rotary: cosines and sines (B, L, 1, D) in fp32 for each head width D that uses RoPE.
    cu_seqlens: (N + 1,) int32 document boundaries over the flattened tokens, then B is 1; None for dense rows.
    chunk_indices: what packed GPU kernels derive from cu_seqlens, made on the host; None if not needed.
    max_seqlen: upper bound on the documents' lengths, with cu_seqlens.
    window: attention window of softmax layers in this loop; None leaves each mixer its own, 0 is full.
    stretch: where these are parts of rows, whose earlier and later tokens lie on other ranks; None: they are all.
    key_blocks: where blocks of keys lie, for each block size that a mixer uses; empty with a decode state.
    sees_all: layers that choose what attention sees see everything, for their choice is still to be learned.
    reuses_selection: they see in this loop what they chose in an earlier one.
    """

    positions: Tensor
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cu_seqlens: Tensor | None = None
    chunk_indices: Tensor | None = None
    max_seqlen: int = 0
    window: int | None = None
    stretch: Stretch | None = None
    key_blocks: dict[int, BlockLayout] = field(default_factory=dict)
    sees_all: bool = False
    reuses_selection: bool = False


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, L, 1, D) of RoPE in the rotate-half pairing: channel i turns with channel i + D/2."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions[..., None, None].double() * theta**-exponents  # fp64: exact for long contexts
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, L, H, D) by its positions; computed in fp32 (fp64 stays fp64)."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
