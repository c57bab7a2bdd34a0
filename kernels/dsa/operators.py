"""The torch operators: `lt2titan::dsa_select`, `dsa_attention` and `dsa_indexer_kl`, each with its fake and gradient.

Selective checkpointing keeps what they return, by their namespace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lt2titan.kernels.dsa.kl_reference import kl_dense_reference, kl_selected_reference
from lt2titan.kernels.dsa.reference import attend_backward_reference, attend_reference, select_reference


@torch.library.custom_op("lt2titan::dsa_select", mutates_args=())
def select(
    index_q: Tensor,
    index_k: Tensor,
    w: Tensor,
    cu_seqlens: Tensor | None,
    top_k: int,
    forced_first: bool,
    forced_local: int,
    backend: str,
) -> Tensor:
    """Selections (B, L, min(top_k, Lk)) int32."""
    if backend == "reference":
        return select_reference(index_q, index_k, w, cu_seqlens, top_k, forced_first, forced_local)
    from lt2titan.kernels.dsa import triton_select

    return triton_select.select(index_q, index_k, w, cu_seqlens, top_k, forced_first, forced_local)


@select.register_fake
def _(
    index_q: Tensor,
    index_k: Tensor,
    w: Tensor,
    cu_seqlens: Tensor | None,
    top_k: int,
    forced_first: bool,
    forced_local: int,
    backend: str,
) -> Tensor:
    batch, length = index_q.shape[:2]
    return index_q.new_empty(batch, length, min(top_k, index_k.shape[1]), dtype=torch.int32)


@torch.library.custom_op("lt2titan::dsa_attention", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """o (B, L, H, D) and lse (B, L, H)."""
    if backend == "reference":
        return attend_reference(q, k, v, indices, scale)
    from lt2titan.kernels.dsa import triton_attention

    return triton_attention.forward(q, k, v, indices, scale)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=_precise_dtype(q))


@torch.library.custom_op("lt2titan::dsa_attention_backward", mutates_args=())
def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, o: Tensor, lse: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    if backend == "reference":
        return attend_backward_reference(do, q, k, v, indices, o, lse, scale)
    from lt2titan.kernels.dsa import triton_attention

    is_deterministic = torch.are_deterministic_algorithms_enabled()
    return triton_attention.backward(do, q, k, v, indices, o, lse, scale, is_deterministic)


@attend_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, o: Tensor, lse: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, indices, *output)


def _attention_gradients(ctx: Any, do: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return (*attend_backward(do, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None, None)


attend.register_autograd(_attention_gradients, setup_context=_save_attention)


@torch.library.custom_op("lt2titan::dsa_indexer_kl", mutates_args=())
def indexer_kl(
    index_q: Tensor,
    index_k: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    lse: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The KL (), and its gradients for index_q, index_k and w."""
    if indices is None or lse is None:
        if backend == "reference":
            return kl_dense_reference(index_q, index_k, w, q, k, cu_seqlens, scale)
        from lt2titan.kernels.dsa import triton_kl_dense

        return triton_kl_dense.kl_dense(index_q, index_k, w, q, k, cu_seqlens, scale)
    if backend == "reference":
        return kl_selected_reference(index_q, index_k, w, q, k, indices, scale)
    from lt2titan.kernels.dsa import triton_kl

    is_deterministic = torch.are_deterministic_algorithms_enabled()
    return triton_kl.kl_selected(index_q, index_k, w, q, k, indices, lse, scale, is_deterministic)


@indexer_kl.register_fake
def _(
    index_q: Tensor,
    index_k: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    lse: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = (x.new_empty(x.shape) for x in (index_q, index_k, w))
    return (q.new_empty((), dtype=_precise_dtype(q)), *gradients)  # type: ignore[return-value]


def _save_kl(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _kl_gradients(ctx: Any, d_kl: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*((d_kl * x).to(x.dtype) for x in ctx.saved_tensors), *[None] * 7)


indexer_kl.register_autograd(_kl_gradients, setup_context=_save_kl)


def _precise_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
