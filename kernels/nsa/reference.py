"""Native sparse attention's compressed and selected branches in plain PyTorch: any sizes, any device.

Documents one after another, queries in blocks: no matrix of all scores exists, in the backward pass neither, which goes
over the blocks again. Scores and probabilities are fp32 at least.

Shapes: T queries of all documents, H query heads of width D, Hkv key heads, G = H / Hkv, C blocks of all documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.nsa.layout import BlockLayout

QUERY_BLOCK = 128
"""Queries whose scores exist at a time."""


class QueryBlock(NamedTuple):
    """Some queries of one document: their places over all queries, the document's keys up to the last of them and its
    blocks, and the queries' positions (n,) in the document."""

    queries: slice
    keys: slice
    blocks: slice
    positions: Tensor


def query_blocks(layout: BlockLayout, block_size: int) -> Iterator[QueryBlock]:
    first_block = 0
    bounds, bounds_k = layout.cu_seqlens.tolist(), layout.cu_seqlens_k.tolist()
    for (start, end), (start_k, end_k) in zip(pairwise(bounds), pairwise(bounds_k), strict=True):
        blocks = slice(first_block, first_block - (start_k - end_k) // block_size)
        for first in range(start, end, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, end)
            last_k = end_k - (end - last)  # nothing after the last query is of interest
            positions = torch.arange(last_k - (last - first), last_k, device=layout.cu_seqlens.device) - start_k
            yield QueryBlock(slice(first, last), slice(start_k, last_k), blocks, positions)
        first_block = blocks.stop


def compressed_scores(q: Tensor, k_cmp: Tensor, positions: Tensor, block_size: int, scale: float) -> Tensor:
    """Scores (..., Hkv, G, n, C) of queries q (..., n, H, D) at ``positions`` (..., n) with compressed keys
    k_cmp (..., C, Hkv, D) of their document; -inf where the block is not wholly past."""
    scores = _scores(q, k_cmp, scale)
    block_ends = torch.arange(1, k_cmp.shape[-3] + 1, device=q.device) * block_size
    is_past = block_ends <= positions[..., None] + 1
    return scores.masked_fill(~is_past[..., None, None, :, :], -torch.inf)


def choose_blocks(probability: Tensor, positions: Tensor, block_size: int, n_blocks: int) -> Tensor:
    """The ``n_blocks`` blocks of greatest ``probability`` (..., Hkv, n, C) for queries at ``positions`` (..., n).

    The first block, the query's own and the one before it come first; of equals, the older. Blocks after the query's
    own are never chosen.

    Returns:
        (..., n, Hkv, n_blocks) int32, rising, -1 at the end where there are fewer.
    """
    block = torch.arange(probability.shape[-1], device=probability.device)
    own = positions[..., None, :, None] // block_size
    is_forced = (block == 0) | (block == own) | (block == own - 1)
    rank = probability.masked_fill(is_forced, torch.inf).masked_fill(block > own, -1)
    values, chosen = rank.sort(dim=-1, descending=True, stable=True)  # stable: of equals, the older
    values, chosen = values[..., :n_blocks], chosen[..., :n_blocks]
    none = probability.shape[-1]
    chosen = chosen.masked_fill(values < 0, none).sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == none, -1)
    missing = n_blocks - chosen.shape[-1]
    return F.pad(chosen, (0, missing), value=-1).transpose(-2, -3).int()


def compressed_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, layout: BlockLayout, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (T, H, D) and log-sum-exp (T, H) of the scores; 0 and -inf for queries that have no past block."""
    outputs, lse = [], []
    for block in query_blocks(layout, block_size):
        o, scores = _compressed(
            q[block.queries], k_cmp[block.blocks], v_cmp[block.blocks], block.positions, block_size, scale
        )
        outputs.append(o)
        lse.append(scores.logsumexp(dim=-1).flatten(0, 1).T)  # (n, H)
    return torch.cat(outputs), torch.cat(lse)


def compressed_backward(
    do: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, layout: BlockLayout, block_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k_cmp and v_cmp."""

    def forward(block: QueryBlock, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _compressed(q, k, v, block.positions, block_size, scale)[0]

    return _pull_back(forward, do, q, k_cmp, v_cmp, [(b, b.blocks) for b in query_blocks(layout, block_size)])


def select(
    q: Tensor, k_cmp: Tensor, lse: Tensor, layout: BlockLayout, block_size: int, n_blocks: int, scale: float
) -> Tensor:
    """(T, Hkv, n_blocks) int32: see `choose_blocks`; the probabilities are summed over the heads of a group."""
    chosen = []
    for block in query_blocks(layout, block_size):
        scores = compressed_scores(q[block.queries], k_cmp[block.blocks], block.positions, block_size, scale)
        normaliser = lse[block.queries].T.unflatten(0, (k_cmp.shape[1], -1))[..., None]
        probability = (scores - normaliser).exp().nan_to_num(0.0).sum(dim=1)  # of no past block: -inf - -inf
        chosen.append(choose_blocks(probability, block.positions, block_size, n_blocks))
    return torch.cat(chosen)


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, layout: BlockLayout, block_size: int, scale: float
) -> Tensor:
    """Output (T, H, D) of attention to the tokens of ``blocks`` (T, Hkv, n_blocks) up to the query itself."""
    outputs = []
    for block in query_blocks(layout, block_size):
        outputs.append(_selected(block, blocks, block_size, scale, q[block.queries], k[block.keys], v[block.keys]))
    return torch.cat(outputs)


def selected_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, layout: BlockLayout, block_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""

    def forward(block: QueryBlock, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _selected(block, blocks, block_size, scale, q, k, v)

    return _pull_back(forward, do, q, k, v, [(b, b.keys) for b in query_blocks(layout, block_size)])


def attend(scores: Tensor, v: Tensor) -> Tensor:
    """softmax of scores (..., Hkv, G, n, m) times v (..., m, Hkv, D) -> (..., n, H, D); 0 where all scores are -inf."""
    highest = scores.amax(dim=-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = (scores - highest.detach()).exp()
    total = weights.sum(dim=-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1.0)
    o = torch.einsum("...hgnm,...mhd->...nhgd", weights, v.to(weights.dtype))
    return o.flatten(-3, -2).to(v.dtype)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q k^T, (..., Hkv, G, n, m), of q (..., n, H, D) and k (..., m, Hkv, D), in fp32 at least."""
    precise = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(precise).unflatten(-2, (k.shape[-2], -1))
    return torch.einsum("...nhgd,...mhd->...hgnm", grouped, k.to(precise)) * scale


def _compressed(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    scores = compressed_scores(q, k, positions, block_size, scale)
    return attend(scores, v), scores


def _selected(
    block: QueryBlock, blocks: Tensor, block_size: int, scale: float, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """As dense attention with a mask: for the short rows of a CPU faster than collecting keys."""
    n_kv_heads, n_blocks = k.shape[1], block.blocks.stop - block.blocks.start
    chosen = blocks[block.queries].long().transpose(0, 1)  # (Hkv, n, n_blocks)
    is_chosen = torch.zeros(*chosen.shape[:2], n_blocks + 1, dtype=torch.bool, device=q.device)
    is_chosen.scatter_(-1, chosen.where(chosen >= 0, n_blocks), True)  # what stands for none goes past the end
    seen = is_chosen[..., :n_blocks].repeat_interleave(block_size, dim=-1)[..., : k.shape[0]]
    seen = seen & (torch.arange(k.shape[0], device=q.device) <= block.positions[:, None])
    grouped = q.unflatten(1, (n_kv_heads, -1)).permute(1, 2, 0, 3)  # (Hkv, G, n, D)
    k, v = (x.transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1) for x in (k, v))
    o = F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen[:, None], scale=scale)
    return o.permute(2, 0, 1, 3).flatten(1, 2)


def _pull_back(
    forward: Callable[[QueryBlock, Tensor, Tensor, Tensor], Tensor],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Sequence[tuple[QueryBlock, slice]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward(block, q, k, v)`` over all query blocks, each with its slice of k and v."""
    dtypes = q.dtype, k.dtype, v.dtype
    precise = torch.promote_types(q.dtype, torch.float32)
    do, q, k, v = (x.to(precise) for x in (do, q, k, v))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for block, seen in blocks:

        def of_block(q: Tensor, k: Tensor, v: Tensor, block: QueryBlock = block) -> Tensor:
            return forward(block, q, k, v)

        pull = torch.func.vjp(of_block, q[block.queries], k[seen], v[seen])[1]
        dq[block.queries], dk_block, dv_block = pull(do[block.queries])
        dk[seen] += dk_block
        dv[seen] += dv_block
    return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[2])
