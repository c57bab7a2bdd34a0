"""The gated delta rule on a GPU: flash-linear-attention's inner forward and backward functions (Triton).

The public functions of fla are not called: they are hidden from torch.compile and carry their own autograd. fla and
triton are imported inside the functions, so that this package works without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lt2titan.kernels.packing import CHUNK_SIZE, contiguous, for_fla


def forward_chunked(
    inputs: Sequence[Tensor],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    scale: float,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Saves the running sum of g within chunks in log2, and the inverses of the chunks' I + A."""
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd

    q, k, v, g, beta = map(contiguous, inputs)
    cu_seqlens, chunk_indices = for_fla(cu_seqlens, chunk_indices)
    g_cumsum, o, inverse, final_state, _, _ = chunk_gated_delta_rule_fwd(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        initial_state=contiguous(initial_state),
        output_final_state=return_final_state,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )
    return o, final_state, [g_cumsum, inverse]


def empty_saved(inputs: Sequence[Tensor]) -> list[Tensor]:
    q, _, v, _, _ = inputs
    return [q.new_empty(v.shape[:3], dtype=torch.float32), q.new_empty(*v.shape[:3], CHUNK_SIZE)]


def forward_recurrent(
    inputs: Sequence[Tensor], initial_state: Tensor | None, scale: float, return_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    from fla.ops.gated_delta_rule.fused_recurrent import fused_recurrent_gated_delta_rule_fwd

    q, k, v, g, beta = map(contiguous, inputs)
    return fused_recurrent_gated_delta_rule_fwd(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        initial_state=contiguous(initial_state),
        output_final_state=return_final_state,
    )


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
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd

    q, k, v, _, beta = map(contiguous, inputs)
    g_cumsum, inverse = saved
    cu_seqlens, chunk_indices = for_fla(cu_seqlens, chunk_indices)
    dq, dk, dv, dbeta, dg, dinitial_state, _, _ = chunk_gated_delta_rule_bwd(
        q=q,
        k=k,
        v=v,
        g=g_cumsum,
        beta=beta,
        A=inverse,
        scale=scale,
        initial_state=contiguous(initial_state),
        do=contiguous(do),
        dht=contiguous(dfinal_state),
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )
    return (dq, dk, dv, dg, dbeta), dinitial_state
