"""Gated linear attention on a GPU: flash-linear-attention's Triton kernels.

fla's `chunk_gla_fwd` and `chunk_gla_bwd` are not called but their steps one by one, for the states between chunks
come from `chunk_states`, which does not synchronise. The backward computes everything inside chunks anew: nothing but
the inputs is kept. fla and triton are imported inside the functions, so that this package works without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lt2titan.kernels.chunk_states import backward_states, forward_states
from lt2titan.kernels.packing import CHUNK_SIZE, contiguous, for_fla


def forward_chunked(
    inputs: Sequence[Tensor],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    scale: float,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    from fla.ops.gla.chunk import chunk_gla_fwd_o_gk

    q, k, v, g = map(contiguous, inputs)
    where = _where(cu_seqlens, chunk_indices)
    total = _running_sum(g, where)
    states, final_state = forward_states(
        k,
        v,
        gk=total,
        initial_state=contiguous(initial_state),
        return_final_state=return_final_state,
        dtype=k.dtype,
        **where,
    )
    scores = _scores(q, k, total, scale, where)
    o = chunk_gla_fwd_o_gk(q=q, v=v, g=total, A=scores, h=states, scale=scale, chunk_size=CHUNK_SIZE, **where)
    return o, final_state, []


def empty_saved(inputs: Sequence[Tensor]) -> list[Tensor]:
    return []


def forward_recurrent(
    inputs: Sequence[Tensor], initial_state: Tensor | None, scale: float, return_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    from fla.ops.common.fused_recurrent import fused_recurrent_fwd

    q, k, v, g = map(contiguous, inputs)
    o, final_state = fused_recurrent_fwd(
        q=q,
        k=k,
        v=v,
        gk=g,
        scale=scale,
        initial_state=contiguous(initial_state),
        output_final_state=return_final_state,
    )
    return o.to(v.dtype), final_state


def backward_chunked(
    do: Tensor,
    dfinal_state: Tensor | None,
    inputs: Sequence[Tensor],
    initial_state: Tensor | None,
    saved: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    scale: float,
) -> tuple[Sequence[Tensor], Tensor | None]:
    from fla.ops.gla.chunk import chunk_gla_bwd_dA, chunk_gla_bwd_dqk_intra, chunk_gla_bwd_dqkg, chunk_gla_bwd_dv

    q, k, v, g = map(contiguous, inputs)
    do, initial_state = contiguous(do), contiguous(initial_state)
    where = _where(cu_seqlens, chunk_indices)
    chunks = {"chunk_size": CHUNK_SIZE, **where}
    total = _running_sum(g, where)
    # In fp32, unlike those of the forward pass: the gradient of g is a sum over products of states and their gradients.
    states, _ = forward_states(
        k, v, gk=total, initial_state=initial_state, return_final_state=False, dtype=torch.float32, **where
    )
    dstates, dinitial_state = backward_states(
        q,
        do,
        gk=total,
        scale=scale,
        initial_state=initial_state,
        dfinal_state=contiguous(dfinal_state),
        **where,
    )
    scores = _scores(q, k, total, scale, where)
    dv = chunk_gla_bwd_dv(k=k, g=total, A=scores, do=do, dh=dstates, **chunks)
    dscores = chunk_gla_bwd_dA(v=v, do=do, scale=scale, **chunks)
    dq, dk = chunk_gla_bwd_dqk_intra(q=q, k=k, g=total, dA=dscores, **chunks)
    dq, dk, dg = chunk_gla_bwd_dqkg(
        q=q, k=k, v=v, h=states, g=total, do=do, dh=dstates, dq=dq, dk=dk, scale=scale, **chunks
    )
    return (dq, dk, dv, dg), dinitial_state


def _where(cu_seqlens: Tensor | None, chunk_indices: Tensor | None) -> dict[str, Any]:
    cu_seqlens, chunk_indices = for_fla(cu_seqlens, chunk_indices)
    return {"cu_seqlens": cu_seqlens, "chunk_indices": chunk_indices}


def _running_sum(g: Tensor, where: dict[str, Any]) -> Tensor:
    """Of g within chunks, in log2 and fp32, (B, L, H, K)."""
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.constant import RCP_LN2

    return chunk_local_cumsum(g, chunk_size=CHUNK_SIZE, scale=RCP_LN2, **where)


def _scores(q: Tensor, k: Tensor, total: Tensor, scale: float, where: dict[str, Any]) -> Tensor:
    """scale q_t . (k_i decayed from i to t) for i <= t in a chunk, (B, L, H, 64) in fp32; unwritten for i > t.

    Kept for the backward it would be an output of the operator, and one that differs from run to run.
    """
    from fla.ops.gla.chunk import chunk_gla_fwd_intra_gk

    return chunk_gla_fwd_intra_gk(q=q, k=k, g=total, scale=scale, chunk_size=CHUNK_SIZE, **where)
