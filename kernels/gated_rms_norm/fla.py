"""Gated RMSNorm on a GPU: flash-linear-attention's fused Triton kernels, imported inside the functions."""

from __future__ import annotations

from torch import Tensor


def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> tuple[Tensor, Tensor]:
    """x and gate (rows, D). Returns y (rows, D) and the reciprocal root mean squares (rows,) in fp32."""
    from fla.modules.norm.fused_norm_gate import layer_norm_gated_fwd

    y, _, rstd, _ = layer_norm_gated_fwd(
        x=x.contiguous(),
        g=gate.contiguous(),
        weight=weight.contiguous(),
        bias=None,
        activation=activation,
        eps=eps,
        is_rms_norm=True,
    )
    return y, rstd


def backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of x, gate and weight."""
    from fla.modules.norm.fused_norm_gate import layer_norm_gated_bwd

    dx, dgate, dweight, _, _ = layer_norm_gated_bwd(
        dy=dy.contiguous(),
        x=x.contiguous(),
        g=gate.contiguous(),
        weight=weight.contiguous(),
        bias=None,
        activation=activation,
        eps=eps,
        rstd=rstd,
        is_rms_norm=True,
    )
    return dx, dgate, dweight
