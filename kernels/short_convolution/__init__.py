"""Short causal depthwise convolution over dense rows or packed documents, with an optional SiLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lt2titan.kernels.packing import check_packed
from lt2titan.kernels.short_convolution import fla
from lt2titan.kernels.short_convolution.reference import short_convolution_reference

__all__ = ["short_convolution"]


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    activation: str = "silu",
    return_final_state: bool = False,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """y_t = act(bias + sum_j weight[:, W - 1 - j] * x_{t - j}) per channel, j = 0 .. W - 1; differentiable.

    Args:
        x: (B, L, D).
        weight: (D, W), W >= 2; the last column multiplies the current token.
        bias: (D,).
        initial_state: (N, D, W - 1), the inputs before the first token, oldest first; zeros when None. N is B, or the
            number of documents.
        cu_seqlens: (N + 1,) int32, document boundaries when documents are packed in one row (then B is 1); it must
            end at L and may repeat L at its end for empty documents. Documents never see each other.
        chunk_indices: as in `gated_delta_rule`; spares the GPU path a synchronisation.
        activation: 'silu' or '' (none).
        return_final_state: also return the last W - 1 inputs of every sequence (before the activation), continued to
            the left by its initial state where the sequence is shorter.
        backend: 'reference' or 'fla', from `backend.resolve_backend`.

    Returns:
        (y (B, L, D), final state (N, D, W - 1) or None), both in x's dtype.

    Raises:
        ValueError: shapes, dtypes or an activation that do not fit, or that the backend does not support.
    """
    _check(x, weight, bias, initial_state, activation, backend)
    check_packed("short_convolution", x.shape[0], cu_seqlens, initial_state)
    y, final_state = _short_convolution(
        x, weight, bias, initial_state, cu_seqlens, chunk_indices, activation, return_final_state, backend
    )
    return y, final_state if return_final_state else None


@torch.library.custom_op("lt2titan::short_convolution", mutates_args=())
def _short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    activation: str,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and final state (empty if not asked for)."""
    final_state: Tensor | None
    if backend == "reference":
        y, final_state = short_convolution_reference(x, weight, bias, initial_state, cu_seqlens, activation)
    else:
        y, final_state = fla.forward(
            x, weight, bias, initial_state, cu_seqlens, chunk_indices, activation, return_final_state
        )
    if final_state is None or not return_final_state:
        final_state = x.new_empty(0)
    return y.contiguous(), final_state.contiguous()


@_short_convolution.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    activation: str,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (N, x.shape[2], weight.shape[1] - 1) if return_final_state else (0,)
    return x.new_empty(x.shape), x.new_empty(state_shape)


@torch.library.custom_op("lt2titan::short_convolution_backward", mutates_args=())
def _short_convolution_backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and initial_state (empty where the input is None)."""
    dy = torch.zeros_like(x) if dy is None else dy
    dbias: Tensor | None
    dinitial_state: Tensor | None
    if backend == "reference":
        optional = [t for t in (bias, initial_state) if t is not None]

        def forward(x: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            b = None if bias is None else rest[0]
            state = None if initial_state is None else rest[-1]
            return short_convolution_reference(x, weight, b, state, cu_seqlens, activation)

        (_, final_state), pullback = torch.func.vjp(forward, x, weight, *optional)[:2]
        dfinal_state = torch.zeros_like(final_state) if dfinal_state is None else dfinal_state
        dx, dweight, *rest = pullback((dy, dfinal_state))
        dbias = None if bias is None else rest[0]
        dinitial_state = None if initial_state is None else rest[-1]
    else:
        dx, dweight, dbias, dinitial_state = fla.backward(
            dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, chunk_indices, activation
        )
    dbias = x.new_empty(0) if dbias is None else dbias.contiguous()
    dinitial_state = x.new_empty(0) if dinitial_state is None else dinitial_state.contiguous()
    return dx.contiguous(), dweight.contiguous(), dbias, dinitial_state


@_short_convolution_backward.register_fake
def _(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    activation: str,
    backend: str,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, initial_state))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, return_final_state, backend = inputs
    ctx.set_materialize_grads(False)
    if not return_final_state:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors)
    ctx.activation, ctx.backend = activation, backend


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under activation checkpointing a second unpacking is an error
    _, _, bias, initial_state, _, _ = saved
    dx, dweight, dbias, dinitial_state = _short_convolution_backward(
        dy, dfinal_state, *saved, ctx.activation, ctx.backend
    )
    dbias = None if bias is None else dbias
    return dx, dweight, dbias, None if initial_state is None else dinitial_state, None, None, None, None, None


_short_convolution.register_autograd(_backward, setup_context=_setup_context)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: str,
    backend: str,
) -> None:
    name = "short_convolution"
    if backend not in ("reference", "fla"):
        raise ValueError(f"{name}: backend is {backend!r}, must be 'reference' or 'fla' (see resolve_backend)")
    if activation not in ("silu", ""):
        raise ValueError(f"{name}: activation is {activation!r}, must be 'silu' or '' (none)")
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 2:
        raise ValueError(
            f"{name}: x is (B, L, D) and weight is (D, W) with W >= 2, got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    if x.shape[1] == 0:
        raise ValueError(f"{name}: no tokens (L = 0)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias is (D,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if initial_state is not None and initial_state.shape[1:] != (weight.shape[0], weight.shape[1] - 1):
        raise ValueError(
            f"{name}: initial_state is (N, D, W - 1) = (N, {weight.shape[0]}, {weight.shape[1] - 1}), "
            f"got {tuple(initial_state.shape)}"
        )
    if backend == "fla" and x.dtype == torch.float64:
        raise ValueError(f"{name}: fla takes bf16, fp16 or fp32, got {x.dtype}; use kernels.backend=reference")
