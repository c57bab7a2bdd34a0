"""The gated delta rule on a GPU: flash-linear-attention's inner forward and backward functions (Triton).

The public functions of fla are not called: they are hidden from torch.compile and carry their own autograd. fla and
triton are imported inside the functions, so that this package works without them.
"""

from __future__ import annotations

from torch import Tensor

from lt2titan.kernels.packing import for_fla


def forward_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    scale: float,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return (o, final state or None, running sum of g within chunks in log2, inverses of the chunks' I + A)."""
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd

    cu_seqlens, chunk_indices = for_fla(cu_seqlens, chunk_indices)
    g_cumsum, o, inverse, final_state, _, _ = chunk_gated_delta_rule_fwd(
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        g=g.contiguous(),
        beta=beta.contiguous(),
        scale=scale,
        initial_state=None if initial_state is None else initial_state.contiguous(),
        output_final_state=return_final_state,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )
    return o, final_state, g_cumsum, inverse


def forward_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    scale: float,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """One kernel that walks over the tokens: for a few tokens without gradients (decoding)."""
    from fla.ops.gated_delta_rule.fused_recurrent import fused_recurrent_gated_delta_rule_fwd

    return fused_recurrent_gated_delta_rule_fwd(
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        g=g.contiguous(),
        beta=beta.contiguous(),
        scale=scale,
        initial_state=None if initial_state is None else initial_state.contiguous(),
        output_final_state=return_final_state,
    )


def backward_chunked(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    g_cumsum: Tensor,
    inverse: Tensor,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return gradients of q, k, v, g (fp32), beta and initial_state."""
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd

    cu_seqlens, chunk_indices = for_fla(cu_seqlens, chunk_indices)
    dq, dk, dv, dbeta, dg, dinitial_state, _, _ = chunk_gated_delta_rule_bwd(
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        g=g_cumsum,
        beta=beta.contiguous(),
        A=inverse,
        scale=scale,
        initial_state=None if initial_state is None else initial_state.contiguous(),
        do=do.contiguous(),
        dht=None if dfinal_state is None else dfinal_state.contiguous(),
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )
    return dq, dk, dv, dg, dbeta, dinitial_state
