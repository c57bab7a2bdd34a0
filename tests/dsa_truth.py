"""DeepSeek Sparse Attention with L x Lk tensors and autograd: the truth for kernels/dsa. The last keys are the queries'
own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


def seen_mask(length: int, documents: Sequence[int] = ()) -> Tensor:
    """(L, L): key s is of query t's document, and not after it."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for start, end in pairwise([0, *accumulate(documents)] if documents else [0, length]):
        seen[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    return seen


def seen_rows(batch: int, n_queries: int, n_keys: int, documents: Sequence[int] = ()) -> Tensor:
    """(B, L, Lk) of rows, over all of which ``documents`` lie end to end."""
    seen = seen_mask(batch * n_keys, documents or [n_keys] * batch).view(batch, n_keys, batch, n_keys)
    return torch.stack([seen[row, n_keys - n_queries :, row] for row in range(batch)])


def scores(index_q: Tensor, index_k: Tensor, w: Tensor) -> Tensor:
    """(B, L, Lk), one index head after another."""
    heads = [w[:, :, j, None] * torch.relu(index_q[:, :, j] @ index_k.transpose(1, 2)) for j in range(index_q.shape[2])]
    return torch.stack(heads).sum(0)


def chosen(scores: Tensor, seen: Tensor, top_k: int, forced_first: bool = False, forced_local: int = 0) -> Tensor:
    """(B, L, Lk) bool: a key is chosen if fewer than top_k visible keys come before it in the order of (forced first,
    greater score, earlier)."""
    n_queries, n_keys = scores.shape[-2:]
    place = torch.arange(n_keys)
    forced = seen & (place > place[n_keys - n_queries :, None] - forced_local)
    if forced_first:
        forced |= seen & (place == seen.int().argmax(-1, keepdim=True))
    scores = scores.masked_fill(forced, torch.inf)
    own, other = scores[..., :, None], scores[..., None, :]
    before = (other > own) | ((other == own) & (place[None, :] < place[:, None]))
    n_before = (before & seen[..., None, :]).sum(-1)
    return seen & (n_before < top_k)


def as_mask(indices: Tensor, n_keys: int = 0) -> Tensor:
    """(B, L, K) places, -1 for none -> (B, L, Lk) bool; as many keys as queries by default."""
    n_keys = n_keys or indices.shape[1]
    padded = torch.zeros(*indices.shape[:2], n_keys + 1, dtype=torch.bool)
    return padded.scatter(2, indices.long().masked_fill(indices < 0, n_keys), True)[..., :n_keys]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention where mask (B, L, Lk) allows; output, and probabilities (B, H, L, Lk)."""
    n_groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(n_groups, dim=2), v.repeat_interleave(n_groups, dim=2)
    products = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    p = products.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p, v), p


def kl(scores: Tensor, p: Tensor, mask: Tensor) -> Tensor:
    """Summed over queries, by torch's own function."""
    log_q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
    target = p.detach().mean(1)
    return torch.nn.functional.kl_div(log_q[mask], target[mask], reduction="sum")
