"""Kimi delta attention: the gated delta rule with a decay per key channel (arXiv 2510.26692)."""

from __future__ import annotations

from torch import Tensor

from lt2titan.kernels.kda.fla import KDAKernels
from lt2titan.kernels.kda.reference import kda_reference
from lt2titan.kernels.recurrence import Recurrence, check_shape

__all__ = ["BOUNDED_OPERATOR", "LOWEST_BOUNDED_LOG_DECAY", "OPERATOR", "kda"]

LOWEST_BOUNDED_LOG_DECAY = -5.0
"""fla's tensor-core kernels factor decays inside blocks of 16 tokens: below this fp32 would overflow."""

_INPUTS = ("q", "k", "v", "g", "beta")
OPERATOR = Recurrence("kda", _INPUTS, kda_reference, KDAKernels(bounded=False), n_saved=2)
BOUNDED_OPERATOR = Recurrence("kda_bounded", _INPUTS, kda_reference, KDAKernels(bounded=True), n_saved=2)


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    bounded: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    return_final_state: bool = False,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t, differentiable.

    Args:
        q, k: (B, L, H, K), already L2-normalised over K.
        v: (B, L, HV, V), HV a multiple of H: value head i reads key head i // (HV / H). Same dtype as q and k.
        g: (B, L, HV, K), the natural logarithms of the decays, <= 0.
        beta: (B, L, HV), the writing strength.
        bounded: the caller knows that g >= LOWEST_BOUNDED_LOG_DECAY (not checked): 'fla' then uses tensor cores
            throughout. The function is the same.
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
        raise ValueError(f"kda: {v.shape[2]} value heads are not a multiple of {q.shape[2]} key heads")
    check_shape("kda", "g", g, (*v.shape[:3], q.shape[-1]), "(B, L, HV, K)")
    check_shape("kda", "beta", beta, v.shape[:3], "(B, L, HV)")
    return (BOUNDED_OPERATOR if bounded else OPERATOR)(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
        return_final_state=return_final_state,
        backend=backend,
    )
