"""RMSNorm over the last dimension, times a learned gain, times an activated gate: the output norm of gated mixers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lt2titan.kernels.gated_rms_norm import fla
from lt2titan.kernels.gated_rms_norm.reference import gated_rms_norm_reference

__all__ = ["gated_rms_norm"]


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, activation: str = "silu", backend: str
) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight * act(gate), computed in fp32 (fp64 for fp64 inputs); differentiable.

    Args:
        x, gate: (..., D).
        weight: (D,).
        eps: added to the mean square.
        activation: 'silu' or 'sigmoid'.
        backend: 'reference' or 'fla', from `backend.resolve_backend`.

    Returns:
        (..., D) in x's dtype.

    Raises:
        ValueError: shapes, dtypes or an activation that do not fit, or that the backend does not support.
    """
    name = "gated_rms_norm"
    if backend not in ("reference", "fla"):
        raise ValueError(f"{name}: backend is {backend!r}, must be 'reference' or 'fla' (see resolve_backend)")
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"{name}: activation is {activation!r}, must be 'silu' or 'sigmoid'")
    if x.shape != gate.shape or weight.shape != x.shape[-1:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, gate, weight))
        raise ValueError(f"{name}: x and gate are (..., D) and weight is (D,), got {shapes}")
    if backend == "fla" and x.dtype == torch.float64:
        raise ValueError(f"{name}: fla takes bf16, fp16 or fp32, got {x.dtype}; use kernels.backend=reference")
    y, _ = _gated_rms_norm(x, gate, weight, eps, activation, backend)
    return y


@torch.library.custom_op("lt2titan::gated_rms_norm", mutates_args=())
def _gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Output, and the reciprocal root mean square of every row for fla's backward (empty for the reference)."""
    if backend == "reference":
        y = gated_rms_norm_reference(x, gate, weight, eps, activation)
        return y.contiguous(), x.new_empty(0, dtype=torch.float32)
    y, rstd = fla.forward(x.flatten(0, -2), gate.flatten(0, -2), weight, eps, activation)
    return y.view(x.shape), rstd


@_gated_rms_norm.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str, backend: str) -> tuple[Tensor, Tensor]:
    rows = 0 if backend == "reference" else x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("lt2titan::gated_rms_norm_backward", mutates_args=())
def _gated_rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    rstd: Tensor,
    eps: float,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight."""
    if backend == "reference":

        def forward(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
            return gated_rms_norm_reference(x, gate, weight, eps, activation)

        _, pullback = torch.func.vjp(forward, x, gate, weight)[:2]
        dx, dgate, dweight = pullback(dy)
    else:
        dx, dgate, dweight = fla.backward(
            dy.flatten(0, -2), x.flatten(0, -2), gate.flatten(0, -2), weight, rstd, eps, activation
        )
    return dx.reshape(x.shape).contiguous(), dgate.reshape(x.shape).contiguous(), dweight.contiguous()


@_gated_rms_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    rstd: Tensor,
    eps: float,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate, weight, ctx.eps, ctx.activation, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, gate, weight, output[1])


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grads = _gated_rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.activation, ctx.backend)
    return (*grads, None, None, None)


_gated_rms_norm.register_autograd(_backward, setup_context=_setup_context)
