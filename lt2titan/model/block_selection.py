"""How good the choice of native sparse attention's blocks is, and how it changes from loop to loop."""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.kernels.attention import own_keys
from lt2titan.kernels.nsa import compress, compressed_attention
from lt2titan.model import attention_mass
from lt2titan.model.context import Context
from lt2titan.model.mixers.nsa import NSA
from lt2titan.model.precision import precise
from lt2titan.model.stretch import rows_so_far


def block_selection_figures(
    mixer: NSA, x: Tensor, context: Context, queries: Tensor, counted: Tensor, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Figures of one visit over ``queries`` (n,), places in the row, where ``counted`` (B, n) says so; and its choice.

    A query counts if it has more blocks than it may choose. Its recall is the attention probability, mean over the
    heads of a group, that full attention would give to the keys of the chosen blocks, divided by the most that as many
    blocks could have; its overlap is the share of its choice that an earlier loop's, ``before``, has too (the blocks
    that are always chosen included). Both are means over groups.

    Args:
        x: (B, L, dim), what the mixer reads.
        before: (B, n, Hkv, n_blocks), the same layer's choice in the loop before, None in the first.

    Returns:
        (4,) fp64: recall summed and how many were, overlap summed and how many were; and the choice
        (B, n, Hkv, n_blocks) int32.
    """
    q, k, _ = mixer.heads(x, context)
    layout, size, cu_seqlens_k = context.key_blocks[mixer.block_size], mixer.block_size, context.cu_seqlens
    if context.stretch is not None:
        (k,) = rows_so_far(k, stretch=context.stretch)
        k = k if context.cu_seqlens is None else k.flatten(0, 1).unsqueeze(0)  # packed rows go as one
        cu_seqlens_k = context.stretch.cu_seqlens_k
    k_cmp = compress(k, layout, size)
    _, lse = compressed_attention(q, k_cmp, k_cmp, layout, block_size=size, backend=mixer.backend)
    chosen = mixer.choose(q, k_cmp, lse, layout)[:, queries]
    q, k = mixer.of_group(q, mixer.head_dim), precise(k)
    (batch, length, n_heads, width), n_keys = q.shape, k.shape[1]
    keys = torch.arange(n_keys, device=x.device)
    own, first_key = own_keys(queries, length, n_keys, context.cu_seqlens, cu_seqlens_k)
    counted = counted & ((own - first_key) // size >= mixer.n_blocks)
    # Of a row: its blocks' first keys and ends, and which block a query's document begins with.
    starts = torch.arange(0, n_keys, size, device=x.device)
    stops, first_block = torch.full_like(starts, n_keys), torch.zeros_like(queries)
    if context.cu_seqlens is not None:
        starts, stops, first_block = layout.block_start, layout.block_stop, layout.query_block[queries]
    block_keys = starts[:, None] + torch.arange(size, device=x.device)
    is_key = block_keys < stops[:, None]
    n_at_a_time = max(1, attention_mass.SCORES // (batch * n_heads * n_keys))
    sums = torch.zeros(4, dtype=torch.float64, device=x.device)
    for part in torch.arange(len(queries), device=x.device).split(n_at_a_time):
        grouped = q[:, queries[part]].to(k.dtype).unflatten(2, (k.shape[2], -1))  # (B, n, Hkv, G, D)
        scores = torch.einsum("bnhgd,bmhd->bnhgm", grouped, k) * width**-0.5
        seen = (keys <= own[part, None]) & (keys >= first_key[part, None])  # (n, Lk)
        p = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1).mean(dim=3)
        mass = (p[..., block_keys.clamp(max=n_keys - 1)] * is_key).sum(dim=-1)  # (B, n, Hkv, blocks)
        is_chosen = _as_mask(chosen[:, part], first_block[part], len(starts))
        most = mass.topk(min(mixer.n_blocks, len(starts)), dim=-1).values.sum(dim=-1)
        recall = (mass * is_chosen).sum(dim=-1) / most
        counts = counted[:, part]
        sums[:2] += torch.stack([_total(recall, counts), counts.sum()])
        if before is not None:
            both = is_chosen & _as_mask(before[:, part], first_block[part], len(starts))
            sums[2:] += torch.stack([_total(both.sum(dim=-1) / is_chosen.sum(dim=-1), counts), counts.sum()])
    return sums, chosen


def _total(figure: Tensor, counts: Tensor) -> Tensor:
    """Mean over groups of ``figure`` (B, n, Hkv), summed over the queries that count (B, n)."""
    return figure.double().mean(dim=-1).masked_fill(~counts, 0.0).sum()


def _as_mask(chosen: Tensor, first_block: Tensor, n_blocks: int) -> Tensor:
    """Blocks (B, n, Hkv, S), counted from ``first_block`` (n,), -1 for none -> (B, n, Hkv, n_blocks) bool."""
    blocks = torch.where(chosen < 0, n_blocks, chosen + first_block[:, None, None])
    mask = chosen.new_zeros(*chosen.shape[:3], n_blocks + 1, dtype=torch.bool)
    return mask.scatter(3, blocks.long(), True)[..., :n_blocks]
