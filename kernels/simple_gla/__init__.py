"""Linear attention with a scalar decay per head: the recurrence of RetNet and Mamba-2, dense or packed."""

from __future__ import annotations

from torch import Tensor

from lt2titan.kernels.recurrence import Recurrence, check_shape
from lt2titan.kernels.simple_gla import fla
from lt2titan.kernels.simple_gla.reference import simple_gla_reference

__all__ = ["OPERATOR", "simple_gla"]

OPERATOR = Recurrence("simple_gla", ("q", "k", "v", "g"), simple_gla_reference, fla, n_saved=1)


def simple_gla(
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
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T and o_t = scale S_t^T q_t, differentiable.

    Args:
        q, k: (B, L, H, K).
        v: (B, L, HV, V), HV a multiple of H: value head i reads key head i // (HV / H). Same dtype as q and k.
        g: (B, L, HV), the natural logarithm of the decay, <= 0.
        scale: of the output; K^-0.5 when None.
        initial_state: (N, HV, K, V) in fp32 (fp64 for fp64 inputs), zeros when None; N is B or the number of documents.
        cu_seqlens: (N + 1,) int32, document boundaries when documents are packed in one row (then B is 1); it must
            end at L and may repeat L at its end for empty documents. Documents never see each other.
        chunk_indices: `packing.make_chunk_indices(cu_seqlens_on_cpu)` moved to the device; without it the GPU path
            computes it, which synchronises. The reference does not need it.
        return_final_state: also return the state after the last token of every sequence.
        backend: 'reference' or 'fla', from `backend.resolve_backend`.

    Returns:
        (output (B, L, HV, V) in v's dtype, final state (N, HV, K, V) in fp32 or fp64, or None).

    Raises:
        ValueError: shapes or dtypes that do not fit, or that the backend does not support.
    """
    if v.shape[2] % q.shape[2] != 0:
        raise ValueError(f"simple_gla: {v.shape[2]} value heads are not a multiple of {q.shape[2]} key heads")
    check_shape("simple_gla", "g", g, v.shape[:3], "(B, L, HV)")
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
