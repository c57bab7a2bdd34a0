"""Causal softmax attention: dense or packed, over everything or a window.

Thin over what torch ships: scaled_dot_product_attention for dense causal rows, `varlen_attn` (FlashAttention) for
packed documents and windows on GPU, an explicit mask on CPU.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# The third takes fp32 without a matrix of all scores; the last takes what is left (fp64).
_GPU_PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = 0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int = 0,
    backend: str,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over earlier tokens of the same document.

    There may be keys of earlier tokens that have no query here: the last keys are those of the queries.

    Args:
        q: (B, L, H, D).
        k: (B, Lk, Hkv, D) with Lk >= L and H a multiple of Hkv.
        v: (B, Lk, Hkv, D).
        window: keys a query sees, itself included; 0 means all.
        cu_seqlens: (N + 1,) int32 document boundaries over L; then B must be 1.
        cu_seqlens_k: (N + 1,) int32, the same documents' boundaries over Lk, each at least as long and ending at the
            same token; needed where Lk > L. A document may have no query.
        max_seqlen: an upper bound on the documents' lengths over Lk, needed with cu_seqlens on GPU.
        backend: "reference" (any device) or "fla" (GPU kernels).

    Returns:
        (B, L, H, D).

    Raises:
        ValueError: sizes that do not fit together, or a dtype that the GPU kernels do not take.
    """
    n_queries, n_keys = q.shape[1], k.shape[1]
    if n_keys < n_queries or (cu_seqlens is not None and cu_seqlens_k is None and n_keys != n_queries):
        raise ValueError(
            f"attention: {n_keys} keys for {n_queries} queries; there must be no fewer, and of packed documents with "
            "more keys than queries the keys' boundaries (cu_seqlens_k) too"
        )
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    is_windowed = 0 < window < n_keys
    is_square = not is_windowed and cu_seqlens is None and n_keys == n_queries
    if backend == "reference":
        mask = None if is_square else causal_mask(n_queries, n_keys, window, cu_seqlens, cu_seqlens_k, q.device)
        return masked_attention(q, k, v, mask)
    if is_square:
        with sdpa_kernel(_GPU_PRIORITY, set_priority=True):
            return masked_attention(q, k, v, None)
    return _varlen(q, k, v, window, cu_seqlens, cu_seqlens_k, max_seqlen)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, Lq, H, D) over (B, Lk, Hkv, D); mask is (B or 1, Lq, Lk), True where seen; None is causal."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask.unsqueeze(1),
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def causal_mask(
    n_queries: int,
    n_keys: int,
    window: int,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    device: torch.device,
) -> Tensor:
    """(1, L, Lk), True where query i may see key j: j <= i < j + window, both in one document."""
    i, j = torch.arange(n_queries, device=device), torch.arange(n_keys, device=device)
    i_k, _ = own_keys(i, n_queries, n_keys, cu_seqlens, cu_seqlens_k)
    distance = i_k[:, None] - j
    mask = distance >= 0
    if window > 0:
        mask &= distance < window
    if cu_seqlens is not None and cu_seqlens_k is not None:
        mask &= documents(i, cu_seqlens)[:, None] == documents(j, cu_seqlens_k)
    return mask[None]


def own_keys(
    queries: Tensor, n_queries: int, n_keys: int, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where the keys of the tokens ``queries`` (n,) stand, and where their documents' first keys do; arguments as in
    `attention`."""
    if cu_seqlens is None or cu_seqlens_k is None:
        return queries + (n_keys - n_queries), torch.zeros_like(queries)
    document = documents(queries, cu_seqlens)
    to_end = cu_seqlens[document + 1] - queries
    return cu_seqlens_k[document + 1] - to_end, cu_seqlens_k[document].to(queries.dtype)


def documents(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The document that each of ``tokens`` (n,) int64, places in a packed row, belongs to."""
    return torch.bucketize(tokens, cu_seqlens[1:].to(tokens.dtype), right=True)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            "windowed or packed attention, and attention to keys of other ranks, runs in bf16 or fp16 on a GPU, not in "
            f"{q.dtype}: set training.mixed_precision_param = 'bfloat16' or kernels.backend = 'reference'"
        )
    (batch, n_queries, n_heads, _), n_keys = q.shape, k.shape[1]
    n_groups = n_heads // k.shape[2]
    options: dict[str, Any] = {}
    if n_groups > 1 and "enable_gqa" in signature(varlen_attn).parameters:  # torch 2.13; torch 2.11 has no switch
        options["enable_gqa"] = True
    elif n_groups > 1:
        k, v = k.repeat_interleave(n_groups, dim=2), v.repeat_interleave(n_groups, dim=2)
    if cu_seqlens is None or cu_seqlens_k is None:
        cu_seqlens, cu_seqlens_k = (
            torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=q.device) for n in (n_queries, n_keys)
        )
        max_seqlen = n_keys
    # varlen_attn counts the keys before a query, this function counts the query itself too.
    # Of documents with more keys than queries it takes the last keys to be the queries' own, as this function does.
    left = window - 1 if window > 0 else -1
    out = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens,
        cu_seqlens_k,
        min(max_seqlen, n_queries),
        max_seqlen,
        window_size=(left, 0),
        **options,
    )
    assert isinstance(out, Tensor)  # the tuple is for return_aux
    return out.view_as(q)
