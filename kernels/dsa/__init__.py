"""DeepSeek Sparse Attention: keys chosen by a lightning indexer, attention to them, and the loss the indexer learns by.

reference.py has the definitions; the GPU kernels are Triton's. No tensor has L x L entries, forward or backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.kernels.dsa.operators import attend, indexer_kl, select
from lt2titan.kernels.packing import check_packed

__all__ = ["dsa_attention", "dsa_indexer_kl", "dsa_select"]


def dsa_select(
    index_q: Tensor,
    index_k: Tensor,
    w: Tensor,
    *,
    top_k: int,
    forced_first: bool = False,
    forced_local: int = 0,
    cu_seqlens: Tensor | None = None,
    backend: str,
) -> Tensor:
    """The keys that each query attends to; not differentiable.

    Scores are computed in fp32 (fp64 for fp64 inputs). Of equal scores (those of keys that no index head likes are
    exactly 0) the earlier key wins, on every device.

    Args:
        index_q: (B, L, J, E), rotated.
        index_k: (B, Lk, E), rotated: one key for all index heads. A row may have keys of earlier tokens that have no
            query here: its last L keys are those of its queries.
        w: (B, L, J), the heads' weights with all scales in them.
        top_k: keys to choose.
        forced_first: the first token of the document is always among them.
        forced_local: and so are the last tokens, as many as this, the query's own included.
        cu_seqlens: (N + 1,) int32 document boundaries over the keys of all rows, flattened (B Lk); none goes on in
            another row.
        backend: "reference" or "fla" (GPU kernels).

    Returns:
        (B, L, min(top_k, Lk)) int32 places in the row of keys, ascending, then -1 where fewer keys are visible.

    Raises:
        ValueError: shapes or numbers that do not fit together, or a dtype that the GPU kernels do not take.
    """
    _check_index("dsa_select", index_q, index_k, w, cu_seqlens, backend)
    if top_k < 1 or forced_local < 0 or forced_first + forced_local > top_k:
        raise ValueError(
            f"dsa_select: top_k = {top_k} must be positive and hold what is forced (first: {forced_first}, local: "
            f"{forced_local})"
        )
    return select(index_q, index_k, w, cu_seqlens, top_k, forced_first, forced_local, backend)


def dsa_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, scale: float | None = None, backend: str
) -> tuple[Tensor, Tensor]:
    """softmax over the selected keys, shared by all heads; differentiable in q, k and v.

    With torch.use_deterministic_algorithms the backward pass adds up in a fixed order, which is slower on a GPU.

    Args:
        q: (B, L, H, D).
        k, v: (B, Lk, Hkv, D) with H a multiple of Hkv.
        indices: (B, L, K) from `dsa_select`, at least one key for each query.
        scale: of q . k, by default D^-0.5.
        backend: as above.

    Returns:
        o (B, L, H, D), and for `dsa_indexer_kl` the log of each softmax's denominator (B, L, H), in fp32 or fp64.
    """
    _check_attention("dsa_attention", q, k, backend)
    if v.shape != k.shape or indices.shape[:2] != q.shape[:2] or indices.dtype != torch.int32:
        raise ValueError(
            f"dsa_attention: v is as k, {tuple(k.shape)}, and indices are (B, L, K) int32; got {tuple(v.shape)}, "
            f"{tuple(indices.shape)} {indices.dtype}"
        )
    o, lse = attend(q, k, v, indices, q.shape[-1] ** -0.5 if scale is None else scale, backend)
    return o, lse


def dsa_indexer_kl(
    index_q: Tensor,
    index_k: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    indices: Tensor | None = None,
    lse: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str,
) -> Tensor:
    """KL of the head-averaged attention distribution to the softmax of the indexer's scores, summed over queries.

    Differentiable in index_q, index_k and w alone: attention is the target.

    Args:
        index_q, index_k, w: as in `dsa_select`.
        q, k: as in `dsa_attention`, of all heads.
        indices: over the keys selected here; None: over all earlier keys of the document (dense warm-up).
        lse: with indices, what `dsa_attention` returned, (B, L, H).
        cu_seqlens: document boundaries, read without indices.
        scale, backend: as above.

    Returns:
        () in fp32 or fp64, in nats.
    """
    _check_index("dsa_indexer_kl", index_q, index_k, w, cu_seqlens, backend)
    _check_attention("dsa_indexer_kl", q, k, backend)
    if (indices is None) != (lse is None) or (q.shape[:2], k.shape[:2]) != (index_q.shape[:2], index_k.shape[:2]):
        raise ValueError(
            "dsa_indexer_kl: indices come with lse, q has as many tokens as index_q and k as many as index_k, got "
            f"{tuple(q.shape)}, {tuple(index_q.shape)}, {tuple(k.shape)}, {tuple(index_k.shape)}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kl, *_ = indexer_kl(index_q, index_k, w, q.detach(), k.detach(), indices, lse, cu_seqlens, scale, backend)
    return kl


def _check_index(
    name: str, index_q: Tensor, index_k: Tensor, w: Tensor, cu_seqlens: Tensor | None, backend: str
) -> None:
    batch, length, n_heads, width = index_q.shape
    fits = index_k.dim() == 3 and index_k.shape[::2] == (batch, width) and index_k.shape[1] >= length
    if not fits or w.shape != (batch, length, n_heads):
        raise ValueError(
            f"{name}: index_q is (B, L, J, E), index_k (B, Lk, E) with Lk at least L, and w (B, L, J), got "
            f"{tuple(index_q.shape)}, {tuple(index_k.shape)}, {tuple(w.shape)}"
        )
    check_packed(name, 1, cu_seqlens, None)  # boundaries are those of flattened rows
    _check_backend(name, index_q, backend)


def _check_attention(name: str, q: Tensor, k: Tensor, backend: str) -> None:
    if k.shape[::3] != q.shape[::3] or k.shape[1] < q.shape[1] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{name}: q is (B, L, H, D) and k (B, Lk, Hkv, D) with Lk at least L and H a multiple of Hkv, got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    _check_backend(name, q, backend)


def _check_backend(name: str, x: Tensor, backend: str) -> None:
    if backend not in ("reference", "fla"):
        raise ValueError(f"{name}: backend is {backend!r}, must be 'reference' or 'fla' (see resolve_backend)")
    if backend == "fla" and x.dtype == torch.float64:
        raise ValueError(
            f"{name}: the GPU kernels take bf16, fp16 or fp32, got {x.dtype}; use kernels.backend=reference"
        )
