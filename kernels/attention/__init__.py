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
    max_seqlen: int = 0,
    backend: str,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over earlier tokens of the same document.

    Args:
        q: (B, L, H, D).
        k: (B, L, Hkv, D) with H a multiple of Hkv.
        v: (B, L, Hkv, D).
        window: keys a query sees, itself included; 0 means all.
        cu_seqlens: (N + 1,) int32 document boundaries over L; then B must be 1.
        max_seqlen: an upper bound on the documents' lengths, needed with cu_seqlens on GPU.
        backend: "reference" (any device) or "fla" (GPU kernels).

    Returns:
        (B, L, H, D).
    """
    length = q.shape[1]
    is_windowed = 0 < window < length
    if backend == "reference":
        mask = None
        if is_windowed or cu_seqlens is not None:
            mask = causal_mask(length, window, cu_seqlens, q.device)
        return masked_attention(q, k, v, mask)
    if not is_windowed and cu_seqlens is None:
        with sdpa_kernel(_GPU_PRIORITY, set_priority=True):
            return masked_attention(q, k, v, None)
    return _varlen(q, k, v, window, cu_seqlens, max_seqlen)


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


def causal_mask(length: int, window: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """(1, L, L), True where query i may see key j: j <= i < j + window, both in one document."""
    i = torch.arange(length, device=device)
    distance = i[:, None] - i[None, :]
    mask = distance >= 0
    if window > 0:
        mask &= distance < window
    if cu_seqlens is not None:
        document = torch.bucketize(i, cu_seqlens[1:].to(i.dtype), right=True)
        mask &= document[:, None] == document[None, :]
    return mask[None]


def _varlen(q: Tensor, k: Tensor, v: Tensor, window: int, cu_seqlens: Tensor | None, max_seqlen: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"windowed or packed attention runs in bf16 or fp16 on a GPU, not in {q.dtype}: set "
            "training.mixed_precision_param = 'bfloat16' or kernels.backend = 'reference'"
        )
    batch, length, n_heads, _ = q.shape
    n_groups = n_heads // k.shape[2]
    options: dict[str, Any] = {}
    if n_groups > 1 and "enable_gqa" in signature(varlen_attn).parameters:  # torch 2.13; torch 2.11 has no switch
        options["enable_gqa"] = True
    elif n_groups > 1:
        k, v = k.repeat_interleave(n_groups, dim=2), v.repeat_interleave(n_groups, dim=2)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
        max_seqlen = length
    # varlen_attn counts the keys before a query, this function counts the query itself too.
    left = window - 1 if window > 0 else -1
    out = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        window_size=(left, 0),
        **options,
    )
    assert isinstance(out, Tensor)  # the tuple is for return_aux
    return out.view_as(q)
