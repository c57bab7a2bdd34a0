"""Delta rule with a diagonal-plus-low-rank transition: the recurrence of RWKV-7 (arXiv 2503.14456)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lt2titan.kernels.dplr_delta_rule import fla
from lt2titan.kernels.dplr_delta_rule.reference import dplr_delta_rule_reference
from lt2titan.kernels.recurrence import Recurrence, check_shape

__all__ = ["LOWEST_LOG_DECAY", "OPERATOR", "dplr_delta_rule"]

LOWEST_LOG_DECAY = -math.exp(-0.5)
"""RWKV-7's own bound, -0.6065. fla's tensor-core kernels factor the decays of a chunk of 64 around its middle: they
lose precision with stronger ones, and overflow below -2.6."""

MAX_FP32_VALUES = 64
"""Value channels of a head that fla's kernels take in fp32: more do not fit into the shared memory of an H200."""

OPERATOR = Recurrence("dplr_delta_rule", ("q", "k", "v", "a", "b", "g"), dplr_delta_rule_reference, fla, n_saved=0)


def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    return_final_state: bool = False,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """S_t = (Diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T and o_t = scale S_t^T q_t, differentiable.

    Args:
        q, k, a, b: (B, L, H, K).
        v: (B, L, H, V). All five share one dtype.
        g: (B, L, H, K), the natural logarithms of the decays, <= 0; for 'fla' also >= LOWEST_LOG_DECAY, which is not
            checked.
        scale: of the output; K^-0.5 when None. RWKV-7 uses 1.
        initial_state: (N, H, K, V) in fp32 (fp64 for fp64 inputs), zeros when None; N is B or the number of documents.
        cu_seqlens: (N + 1,) int32, document boundaries when documents are packed in one row (then B is 1); it must
            end at L and may repeat L at its end for empty documents. Documents never see each other.
        chunk_indices: `packing.make_chunk_indices(cu_seqlens_on_cpu)` moved to the device; without it the GPU path
            computes it, which synchronises. The reference does not need it.
        return_final_state: also return the state after the last token of every sequence.
        backend: 'reference' or 'fla', from `backend.resolve_backend`. In fp32, 'fla' runs more than MAX_FP32_VALUES
            value channels in parts.

    Returns:
        (output (B, L, H, V) in v's dtype, final state (N, H, K, V) in fp32 or fp64, or None).

    Raises:
        ValueError: shapes or dtypes that do not fit, or that the backend does not support.
    """
    if v.shape[2] != q.shape[2]:
        raise ValueError(f"dplr_delta_rule: {v.shape[2]} value heads for {q.shape[2]} query heads; they must be equal")
    for what, tensor in (("a", a), ("b", b), ("g", g)):
        check_shape("dplr_delta_rule", what, tensor, q.shape, "(B, L, H, K)")
    if not a.dtype == b.dtype == q.dtype:
        raise ValueError(f"dplr_delta_rule: a and b must have q's dtype {q.dtype}, got {a.dtype} and {b.dtype}")
    options: dict[str, Any] = {
        "scale": scale,
        "cu_seqlens": cu_seqlens,
        "chunk_indices": chunk_indices,
        "return_final_state": return_final_state,
        "backend": backend,
    }
    if backend != "fla" or q.dtype != torch.float32 or v.shape[-1] <= MAX_FP32_VALUES:
        return OPERATOR(q, k, v, a, b, g, initial_state=initial_state, **options)
    # Value channels know nothing of each other: what is too wide runs in parts.
    values = v.split(MAX_FP32_VALUES, dim=-1)
    states = [None] * len(values) if initial_state is None else initial_state.split(MAX_FP32_VALUES, dim=-1)
    parts = [OPERATOR(q, k, x, a, b, g, initial_state=s, **options) for x, s in zip(values, states, strict=True)]
    outputs, ends = zip(*parts, strict=True)
    return torch.cat(outputs, dim=-1), torch.cat(ends, dim=-1) if return_final_state else None
