"""Short causal depthwise convolution on a GPU: flash-linear-attention's Triton kernels.

fla keeps states of W columns of which the first is never read; ours hold W - 1. Imports are inside the functions, so
that this package works without fla and triton.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.packing import for_fla


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    activation: str,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return (y, final state (N, D, W - 1) or None)."""
    from fla.modules.causal_conv1d.ops import causal_conv1d_fwd, causal_conv1d_update_states

    x, cu_seqlens, chunk_indices = x.contiguous(), *for_fla(cu_seqlens, chunk_indices)
    y, _ = causal_conv1d_fwd(
        x=x,
        weight=weight.contiguous(),
        bias=bias,
        residual=None,
        initial_state=_widen(initial_state),
        output_final_state=False,
        activation=activation or None,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )
    if not return_final_state:
        return y, None
    state = None if initial_state is None else initial_state.contiguous()
    final_state = causal_conv1d_update_states(
        x=x, state_len=weight.shape[1] - 1, initial_state=state, cu_seqlens=cu_seqlens
    )
    return y, final_state


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return gradients of x, weight, bias and initial_state."""
    from fla.modules.causal_conv1d.ops import causal_conv1d_bwd

    cu_seqlens, chunk_indices = for_fla(cu_seqlens, chunk_indices)
    dx, dweight, dbias, _, dinitial_state = causal_conv1d_bwd(
        x=x.contiguous(),
        dy=dy.contiguous(),
        dht=_widen(dfinal_state),
        weight=weight.contiguous(),
        bias=bias,
        initial_state=_widen(initial_state),
        activation=activation or None,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )
    return dx, dweight, dbias, None if dinitial_state is None else dinitial_state[:, :, 1:]


def _widen(state: Tensor | None) -> Tensor | None:
    """(N, D, W - 1) -> (N, D, W), a zero column first."""
    return None if state is None else F.pad(state, (1, 0)).contiguous()
