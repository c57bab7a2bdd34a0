"""Linear attention with a scalar decay on a GPU: flash-linear-attention's inner functions (Triton).

The public functions of fla are not called: they are hidden from torch.compile and carry their own autograd. fla and
triton are imported inside the functions, so that this package works without them.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Saves the running sum of g within chunks in log2; the backward computes the states anew."""
    from fla.ops.common.chunk_o import chunk_fwd_o
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.constant import RCP_LN2

    q, k, v, g = map(contiguous, inputs)
    cu_seqlens, chunk_indices = for_fla(cu_seqlens, chunk_indices)
    g_cumsum = chunk_local_cumsum(
        g, chunk_size=CHUNK_SIZE, scale=RCP_LN2, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices
    )
    states, final_state = forward_states(
        _per_value_head(k, v),
        v,
        g=g_cumsum,
        initial_state=contiguous(initial_state),
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
        return_final_state=return_final_state,
        dtype=k.dtype,
    )
    o = chunk_fwd_o(
        q=q, k=k, v=v, h=states, g=g_cumsum, scale=scale, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices
    )
    return o, final_state, [g_cumsum]


def empty_saved(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [inputs[3].new_empty(inputs[3].shape, dtype=torch.float32)]


def forward_recurrent(
    inputs: Sequence[Tensor], initial_state: Tensor | None, scale: float, return_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    from fla.ops.common.fused_recurrent import fused_recurrent_fwd

    q, k, v, g = map(contiguous, inputs)
    o, final_state = fused_recurrent_fwd(
        q=_per_value_head(q, v),
        k=_per_value_head(k, v),
        v=v,
        g=g,
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
    from fla.ops.common.chunk_o import chunk_bwd_dqkwg, chunk_bwd_dv
    from fla.ops.utils import chunk_local_cumsum

    q, k, v, _ = map(contiguous, inputs)
    do, (g_cumsum,) = contiguous(do), saved
    cu_seqlens, chunk_indices = for_fla(cu_seqlens, chunk_indices)
    initial_state = contiguous(initial_state)
    # In fp32, unlike those of the forward pass: the gradient of g is a sum over products of states and their gradients.
    states, _ = forward_states(
        _per_value_head(k, v),
        v,
        g=g_cumsum,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
        return_final_state=False,
        dtype=torch.float32,
    )
    dstates, dinitial_state = backward_states(
        _per_value_head(q, v),
        do,
        g=g_cumsum,
        scale=scale,
        initial_state=initial_state,
        dfinal_state=contiguous(dfinal_state),
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )
    dq, dk, _, dg = chunk_bwd_dqkwg(
        q=q,
        k=k,
        v=v,
        g=g_cumsum,
        do=do,
        h=states,
        dh=dstates,
        scale=scale,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )
    dv = chunk_bwd_dv(
        q=q, k=k, g=g_cumsum, do=do, dh=dstates, scale=scale, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices
    )
    dg = chunk_local_cumsum(dg, chunk_size=CHUNK_SIZE, reverse=True, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices)
    return (dq, dk, dv, dg), dinitial_state


def _per_value_head(x: Tensor, v: Tensor) -> Tensor:
    """q or k (B, L, H, K) repeated for the value heads that read it (B, L, HV, K)."""
    group = v.shape[2] // x.shape[2]
    return x if group == 1 else x.repeat_interleave(group, dim=2)
