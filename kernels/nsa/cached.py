"""Native sparse attention of new tokens over a cache: what decoding does instead of the operators.

Row b of the cache is one sequence, with its token at position p in slot p; row b of the new tokens continues it. Keys
that a query looks at are collected, so that one new token costs what it sees, and not the whole cache. All shapes are
fixed, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.nsa.reference import attend, choose_blocks, compressed_scores

QUERY_BLOCK = 128
"""New tokens of a row whose keys are collected at a time."""

Branches = tuple[Tensor, Tensor, Tensor]
"""Outputs (B, n, H, D) of the compressed, the selected and the window branch."""


def cached_branches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    positions: Tensor,
    *,
    block_size: int,
    n_blocks: int,
    window: int,
) -> Branches:
    """The three branches of new tokens.

    Args:
        q: (B, n, H, D); the cache holds the keys of these tokens already.
        k: (B, capacity, Hkv, D), the cache; so is v.
        k_cmp: (B, ceil(capacity / block_size), Hkv, D), means of the blocks that are whole; so is v_cmp.
        positions: (B, n) int64; below 0 there is no token, and the outputs there mean nothing.
    """
    scale = q.shape[-1] ** -0.5
    positions = positions.clamp(min=0)
    outputs = []
    for q_part, at in zip(q.split(QUERY_BLOCK, dim=1), positions.split(QUERY_BLOCK, dim=1), strict=True):
        scores = compressed_scores(q_part, k_cmp, at, block_size, scale)
        normaliser = scores.logsumexp(dim=-1, keepdim=True)
        probability = (scores - normaliser).exp().nan_to_num(0.0).sum(dim=-3)
        blocks = choose_blocks(probability, at, block_size, n_blocks).long()
        in_block = torch.arange(block_size, device=q.device)
        chosen = (blocks[..., None] * block_size + in_block).flatten(-2)  # (B, n, Hkv, n_blocks * block_size)
        near = at[:, :, None, None] - torch.arange(window, device=q.device)
        outputs.append(
            (
                attend(scores, v_cmp),
                _attend_slots(q_part, k, v, chosen, at, scale),
                _attend_slots(q_part, k, v, near.expand(-1, -1, k.shape[2], -1), at, scale),
            )
        )
    compressed, selected, windowed = (torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
    return compressed, selected, windowed


def _attend_slots(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Attention (B, n, H, D) to those of ``slots`` (B, n, Hkv, m) of the cache that lie in 0..position."""
    seen = (slots >= 0) & (slots <= positions[:, :, None, None])
    slots = slots.clamp(0, k.shape[1] - 1)
    row = torch.arange(k.shape[0], device=k.device)[:, None, None, None]
    head = torch.arange(k.shape[2], device=k.device)[:, None]
    keys, values = k[row, slots, head], v[row, slots, head]  # (B, n, Hkv, m, D)
    grouped = q.unflatten(2, (k.shape[2], -1))  # (B, n, Hkv, G, D)
    o = F.scaled_dot_product_attention(
        grouped.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        attn_mask=seen.flatten(0, 1).unsqueeze(-2),
        scale=scale,
    )
    return o.reshape(q.shape)  # a GPU's attention may return it strided
