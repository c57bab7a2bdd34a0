"""How much softmax attention rests on the first token of a document (the attention sink, arXiv 2309.17453)."""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = 1 << 26
"""Scores that exist at a time: 256 MB in fp32."""


def first_token_mass(
    q: Tensor, k: Tensor, window: int, cu_seqlens: Tensor | None, queries: Tensor, counted: Tensor
) -> Tensor:
    """Probability that queries give to the first token of their document, in fp32 (fp64 stays fp64).

    A query counts where ``counted`` says so, it is not the first token itself, and it still has that in its window:
    with a window w those are tokens 1 to w - 1 of a document, because from the others it is hidden by construction.
    Without cu_seqlens a row is one document, as attention sees it. Queries are taken in chunks: never more than
    ``SCORES`` scores at a time (or those of one query), so that long rows need not have a matrix of all.

    Args:
        q: (B, L, H, D), rotated.
        k: (B, L, Hkv, D), rotated; H is a multiple of Hkv.
        window: keys a query sees, itself included; 0 means all.
        cu_seqlens: (N + 1,) int32 document boundaries over L, then B is 1; or None.
        queries: (n,) int64, places in the row.
        counted: (B, n) bool.

    Returns:
        (2,) fp64: the probabilities' sum over heads and queries, and how many were summed.
    """
    batch, length, n_heads, head_dim = q.shape
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    keys = torch.arange(length, device=q.device)
    document = firsts = torch.zeros_like(keys)
    if cu_seqlens is not None:
        boundaries = cu_seqlens.to(keys.dtype)
        document = torch.bucketize(keys, boundaries[1:], right=True)
        firsts = boundaries[document]
    n_at_a_time = max(1, SCORES // (batch * n_heads * length))
    result = torch.zeros(2, dtype=torch.float64, device=q.device)
    for i, is_counted in zip(queries.split(n_at_a_time), counted.split(n_at_a_time, dim=1), strict=True):
        distance = i[:, None] - keys
        mask = (distance >= 0) & (document[i][:, None] == document)
        if window:
            mask &= distance < window
        grouped = q[:, i].to(k.dtype).unflatten(2, (k.shape[2], -1))  # (B, n, Hkv, G, D)
        scores = torch.einsum("bihgd,bjhd->bhgij", grouped, k) / head_dim**0.5
        probability = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        first = firsts[i]
        mass = probability.gather(-1, first[:, None].expand(*probability.shape[:-1], 1)).squeeze(-1)  # (B, Hkv, G, n)
        seen = is_counted & (i > first)
        if window:
            seen &= i - first < window
        mass = mass.sum(dim=(1, 2)).double().masked_fill(~seen, 0.0)
        result += torch.stack([mass.sum(), seen.sum() * n_heads])
    return result
