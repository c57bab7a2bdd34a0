"""Sparse attention written out: masks and matrices of all scores, and inputs to compare on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.check.other_operators import normal


def nsa_probabilities(q: Tensor, k: Tensor, block_size: int, documents: Sequence[int]) -> Tensor:
    """Probability (B, Hkv, L, C) of each block of a query's document by softmax over the means of the past ones, summed
    over the heads of a group; C is the most blocks that a document has, counted from its start."""
    weights = _compressed_weights(q, k, block_size, documents)
    return weights.unflatten(1, (k.shape[2], -1)).sum(dim=2)


def chosen_mass(blocks: Tensor, probabilities: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Of the blocks (B, L, Hkv, n) that queries at ``positions`` (L,) chose, the sum (B, L, Hkv) of their
    ``probabilities`` (B, Hkv, L, C); a block that must be chosen counts 1, one that must not -1."""
    block = torch.arange(probabilities.shape[-1], device=positions.device)
    own = positions[:, None] // block_size
    worth = probabilities.masked_fill((block == 0) | (block == own) | (block == own - 1), 1.0)
    worth = F.pad(worth.masked_fill(block > own, -1.0), (0, 1))  # the last for "none"
    index = blocks.long().transpose(1, 2)
    return worth.gather(-1, index.where(index >= 0, probabilities.shape[-1])).sum(dim=-1).transpose(1, 2)


def nsa_definition(
    q: Tensor, k: Tensor, v: Tensor, *, blocks: Tensor, block_size: int, documents: Sequence[int]
) -> Tensor:
    """Attention to the means of past blocks, and to the tokens of ``blocks`` (B, L, Hkv, n), with all masks written
    out; (B, L, 2 H, D)."""
    n_groups = q.shape[2] // k.shape[2]
    compressed, first = [], 0
    weights = _compressed_weights(q, k, block_size, documents)
    seen = torch.zeros(q.shape[0], k.shape[2], q.shape[1], q.shape[1], dtype=torch.bool, device=q.device)
    for length in documents:
        last, n_blocks = first + length, length // block_size
        whole = v[:, first : first + n_blocks * block_size].unflatten(1, (n_blocks, block_size)).mean(dim=2)
        whole = whole.repeat_interleave(n_groups, dim=2)
        compressed.append(torch.einsum("bhic,bchd->bihd", weights[:, :, first:last, :n_blocks], whole))
        block = torch.arange(length, device=q.device) // block_size
        chosen = (blocks[:, first:last, :, :, None] == block).any(dim=3).transpose(1, 2)  # (B, Hkv, n, n)
        seen[:, :, first:last, first:last] = chosen.tril()
        first = last
    k, v, seen = k.repeat_interleave(n_groups, 2), v.repeat_interleave(n_groups, 2), seen.repeat_interleave(n_groups, 1)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    selected = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), v)
    return torch.cat([torch.cat(compressed, dim=1), selected], dim=2)


def _compressed_weights(q: Tensor, k: Tensor, block_size: int, documents: Sequence[int]) -> Tensor:
    """(B, H, L, C): softmax of each query's scores with the means of the blocks of its document that are past."""
    n_columns = -(-max(documents) // block_size)
    weights, first = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], n_columns), 0
    for length in documents:
        n_blocks, begin = length // block_size, block_size - 1  # the first token that has a past block
        if n_blocks:
            means = k[:, first : first + n_blocks * block_size].unflatten(1, (n_blocks, block_size)).mean(dim=2)
            means = means.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
            scores = torch.einsum("bihd,bchd->bhic", q[:, first + begin : first + length], means) * q.shape[-1] ** -0.5
            ends = torch.arange(1, n_blocks + 1, device=q.device) * block_size
            is_past = ends <= torch.arange(begin, length, device=q.device)[:, None] + 1
            rows = scores.masked_fill(~is_past, -torch.inf).softmax(dim=-1)
            rows = F.pad(rows, (0, n_columns - n_blocks, begin, 0))
            weights = weights.slice_scatter(rows, 2, first, first + length)
        first += length
    return weights


def seen_rows(batch: int, length: int, n_before: int, documents: Sequence[int], device: torch.device) -> Tensor:
    """(B, length - n_before, length): which keys the queries of each row see, without those of its first n_before
    tokens; ``documents`` lie end to end over all rows, none in two of them."""
    seen = torch.zeros(batch * length, batch * length, dtype=torch.bool, device=device)
    for start, end in pairwise([0, *accumulate(documents or [length] * batch)]):
        seen[start:end, start:end] = torch.ones(end - start, end - start, device=device).tril().bool()
    rows = [slice(row * length, (row + 1) * length) for row in range(batch)]
    return torch.stack([seen[row, row][n_before:] for row in rows])


def dsa_inputs(batch: int, length: int, *, H: int, HV: int, K: int, J: int, E: int) -> dict[str, Tensor]:
    """H query heads on HV key heads of width K; J index heads of width E on one index key."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"index_q": (J, E), "index_k": (E,), "w": (J,), "q": (H, K), "k": (HV, K), "v": (HV, K)}
    inputs = {name: normal(generator, batch, length, *shape) for name, shape in shapes.items()}
    inputs["w"] *= (J * E) ** -0.5
    return inputs


def dsa_definition(
    index_q: Tensor,
    index_k: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    indices: Tensor,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention (B, L, H, D) to the selected keys, and the KL () over them, or over all that are ``seen`` (B, L, Lk),
    with (B, H, L, Lk) tensors."""
    n_groups, length = q.shape[2] // k.shape[2], k.shape[1]
    k, v = k.repeat_interleave(n_groups, dim=2), v.repeat_interleave(n_groups, dim=2)
    products = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    learned = torch.zeros(*indices.shape[:2], length + 1, dtype=torch.bool, device=q.device)
    learned = learned.scatter(2, torch.where(indices < 0, length, indices).long(), True)[..., :length]
    p = products.masked_fill(~learned[:, None], -torch.inf).softmax(dim=-1)
    o = torch.einsum("bhij,bjhd->bihd", p, v)
    if seen is not None:
        learned = seen
        p = products.masked_fill(~learned[:, None], -torch.inf).softmax(dim=-1)
    scores = torch.einsum("bij,bijs->bis", w, torch.einsum("bije,bse->bijs", index_q, index_k).relu())
    log_q = scores.masked_fill(~learned, -torch.inf).log_softmax(dim=-1)[learned]
    target = p.detach().mean(dim=1)[learned]
    return o, (torch.special.xlogy(target, target) - target * log_q).sum()
