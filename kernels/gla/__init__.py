"""Gated linear attention: a recurrence with a decay per key channel (arXiv 2312.06635; HGRN2, arXiv 2404.07904)."""

from __future__ import annotations

from torch import Tensor

from lt2titan.kernels.gla import fla
from lt2titan.kernels.gla.reference import gla_reference
from lt2titan.kernels.recurrence import Recurrence, check_shape

__all__ = ["OPERATOR", "gla"]

OPERATOR = Recurrence("gla", ("q", "k", "v", "g"), gla_reference, fla, n_saved=0)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    return_final_state: bool = False,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = scale S_t^T q_t, differentiable.

    Args:
        q, k: (B, L, H, K).
        v: (B, L, H, V), in the dtype of q and k.
        g: (B, L, H, K), the natural logarithm of the decay of each key channel, <= 0.
        scale: of the output; K^-0.5 when None.
        initial_state: (N, H, K, V) in fp32 (fp64 for fp64 inputs), zeros when None; N is B or the number of documents.
        cu_seqlens: (N + 1,) int32, document boundaries when documents are packed in one row (then B is 1); it must
            end at L and may repeat L at its end for empty documents. Documents never see each other.
        chunk_indices: `packing.make_chunk_indices(cu_seqlens_on_cpu)` moved to the device; without it the GPU path
            computes it, which synchronises. The reference does not need it.
        return_final_state: also return the state after the last token of every sequence.
        backend: 'reference' or 'fla', from `backend.resolve_backend`.

    Returns:
        (output (B, L, H, V) in v's dtype, final state (N, H, K, V) in fp32 or fp64, or None).

    Raises:
        ValueError: shapes or dtypes that do not fit, or that the backend does not support.
    """
    if v.shape[2] != q.shape[2]:
        raise ValueError(f"gla: v has {v.shape[2]} heads, q and k have {q.shape[2]}")
    check_shape("gla", "g", g, k.shape, "(B, L, H, K)")
    return OPERATOR(
        q,
        k,
        v,
        g,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
        return_final_state=return_final_state,
        backend=backend,
    )
