"""How much softmax attention rests on the first token of a document (the attention sink, arXiv 2309.17453)."""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.kernels.attention import own_keys
from lt2titan.model.precision import precise

SCORES = 1 << 26
"""Scores that exist at a time: 256 MB in fp32."""


def first_token_mass(
    q: Tensor,
    k: Tensor,
    window: int,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    queries: Tensor,
    counted: Tensor,
) -> Tensor:
    """Probability that queries give to the first token of their document, in fp32 (fp64 stays fp64).

    A query counts where ``counted`` says so, it is not the first token itself, and it still has that in its window:
    with a window w those are tokens 1 to w - 1 of a document, because from the others it is hidden by construction.
    Without cu_seqlens a row is one document, as attention sees it. Queries are taken in chunks: never more than
    ``SCORES`` scores at a time (or those of one query), so that long rows need not have a matrix of all.

    Args:
        q: (B, L, H, D), rotated.
        k: (B, Lk, Hkv, D), rotated; H is a multiple of Hkv. The last keys are those of the queries.
        window: keys a query sees, itself included; 0 means all.
        cu_seqlens, cu_seqlens_k: (N + 1,) int32 document boundaries over L and over Lk, then B is 1; or None.
        queries: (n,) int64, places in the row.
        counted: (B, n) bool.

    Returns:
        (2,) fp64: the probabilities' sum over heads and queries, and how many were summed.
    """
    (batch, n_queries, n_heads, head_dim), n_keys = q.shape, k.shape[1]
    k = precise(k)
    keys = torch.arange(n_keys, device=q.device)
    n_at_a_time = max(1, SCORES // (batch * n_heads * n_keys))
    result = torch.zeros(2, dtype=torch.float64, device=q.device)
    for i, is_counted in zip(queries.split(n_at_a_time), counted.split(n_at_a_time, dim=1), strict=True):
        own, first = own_keys(i, n_queries, n_keys, cu_seqlens, cu_seqlens_k)
        distance = own[:, None] - keys
        mask = (distance >= 0) & (keys >= first[:, None])
        if window:
            mask &= distance < window
        grouped = q[:, i].to(k.dtype).unflatten(2, (k.shape[2], -1))  # (B, n, Hkv, G, D)
        scores = torch.einsum("bihgd,bjhd->bhgij", grouped, k) / head_dim**0.5
        probability = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        mass = probability.gather(-1, first[:, None].expand(*probability.shape[:-1], 1)).squeeze(-1)  # (B, Hkv, G, n)
        seen = is_counted & (own > first)
        if window:
            seen &= own - first < window
        mass = mass.sum(dim=(1, 2)).double().masked_fill(~seen, 0.0)
        result += torch.stack([mass.sum(), seen.sum() * n_heads])
    return result
