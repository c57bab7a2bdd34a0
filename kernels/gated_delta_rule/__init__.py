"""Gated delta rule: the recurrence of Gated DeltaNet (arXiv 2412.06464) over dense rows or packed documents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lt2titan.kernels.gated_delta_rule import fla
from lt2titan.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from lt2titan.kernels.packing import CHUNK_SIZE, check_packed

__all__ = ["gated_delta_rule"]

RECURRENT_MAX_LENGTH = 16  # without gradients, up to here fla's single recurrent kernel replaces the chunked ones


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    return_final_state: bool = False,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T and o_t = scale S_t^T q_t, differentiable.

    Args:
        q, k: (B, L, H, K), already L2-normalised over K.
        v: (B, L, HV, V), HV a multiple of H: value head i reads key head i // (HV / H). Same dtype as q and k.
        g: (B, L, HV), the natural logarithm of the decay, <= 0.
        beta: (B, L, HV), the writing strength.
        scale: of the output; K^-0.5 when None.
        initial_state: (N, HV, K, V) in fp32 (fp64 for fp64 inputs), zeros when None; N is B or the number of documents.
        cu_seqlens: (N + 1,) int32, document boundaries when documents are packed in one row (then B is 1); it must
            end at L and may repeat L at its end for empty documents. Documents never see each other.
        chunk_indices: `packing.make_chunk_indices(cu_seqlens_on_cpu)` moved to the device; without it the GPU path
            computes it, which synchronises. The reference does not need it.
        return_final_state: also return the state after the last token of every sequence.
        backend: 'reference' or 'fla', from `backend.resolve_backend`.

    Returns:
        (output (B, L, HV, V) in v's dtype, final state (N, HV, K, V) in fp32 or fp64, or None).

    Raises:
        ValueError: shapes or dtypes that do not fit, or that the backend does not support.
    """
    _check(q, k, v, g, beta, initial_state, backend)
    check_packed("gated_delta_rule", q.shape[0], cu_seqlens, initial_state)
    tensors = (q, k, v, g, beta, initial_state)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    recurrent = not needs_grad and cu_seqlens is None and q.shape[1] <= RECURRENT_MAX_LENGTH
    o, final_state, _, _ = _gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        initial_state,
        cu_seqlens,
        chunk_indices,
        k.shape[-1] ** -0.5 if scale is None else scale,
        return_final_state,
        recurrent,
        backend,
    )
    return o, final_state if return_final_state else None


@torch.library.custom_op("lt2titan::gated_delta_rule", mutates_args=())
def _gated_delta_rule(
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
    recurrent: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final state, and what fla's backward needs: running sums of g and inverses; empty where unused.

    `recurrent` lets fla use its kernel for a few tokens, which has no backward.
    """
    final_state: Tensor | None
    g_cumsum, inverse = q.new_empty(0, dtype=torch.float32), q.new_empty(0)
    if backend == "reference":
        o, final_state = gated_delta_rule_reference(q, k, v, g, beta, initial_state, cu_seqlens, scale)
    elif recurrent:
        o, final_state = fla.forward_recurrent(q, k, v, g, beta, initial_state, scale, return_final_state)
    else:
        o, final_state, g_cumsum, inverse = fla.forward_chunked(
            q, k, v, g, beta, initial_state, cu_seqlens, chunk_indices, scale, return_final_state
        )
    if final_state is None or not return_final_state:
        final_state = q.new_empty(0, dtype=_state_dtype(q))
    return o.contiguous(), final_state.contiguous(), g_cumsum, inverse


@_gated_delta_rule.register_fake
def _(
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
    recurrent: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, HV, V = v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (N, HV, k.shape[-1], V) if return_final_state else (0,)
    chunked = backend == "fla" and not recurrent
    return (
        v.new_empty(B, L, HV, V),
        v.new_empty(state_shape, dtype=_state_dtype(q)),
        v.new_empty((B, L, HV) if chunked else (0,), dtype=torch.float32),
        q.new_empty((B, L, HV, CHUNK_SIZE) if chunked else (0,)),
    )


@torch.library.custom_op("lt2titan::gated_delta_rule_backward", mutates_args=())
def _gated_delta_rule_backward(
    do: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    g_cumsum: Tensor,
    inverse: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and initial_state (empty if there is none)."""
    do = torch.zeros_like(v) if do is None else do
    if backend == "reference":

        def forward(
            q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            return gated_delta_rule_reference(q, k, v, g, beta, state, cu_seqlens, scale)

        primals = (q, k, v, g, beta) if initial_state is None else (q, k, v, g, beta, initial_state)
        (_, final_state), pullback = torch.func.vjp(forward, *primals)[:2]
        dfinal_state = torch.zeros_like(final_state) if dfinal_state is None else dfinal_state
        dq, dk, dv, dg, dbeta, *rest = pullback((do, dfinal_state))
        dinitial_state = rest[0] if rest else None
    else:
        dq, dk, dv, dg, dbeta, dinitial_state = fla.backward_chunked(
            do,
            dfinal_state,
            q,
            k,
            v,
            beta,
            initial_state,
            g_cumsum,
            inverse,
            cu_seqlens,
            chunk_indices,
            scale,
        )
        dg = dg.to(g.dtype)
    if dinitial_state is None:
        dinitial_state = q.new_empty(0, dtype=_state_dtype(q))
    dq, dk, dv, dg, dbeta, dinitial_state = (grad.contiguous() for grad in (dq, dk, dv, dg, dbeta, dinitial_state))
    return dq, dk, dv, dg, dbeta, dinitial_state


@_gated_delta_rule_backward.register_fake
def _(
    do: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    g_cumsum: Tensor,
    inverse: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, ...]:
    state_shape = (0,) if initial_state is None else initial_state.shape
    like = [t.new_empty(t.shape) for t in (q, k, v, g, beta)]
    return (*like, q.new_empty(state_shape, dtype=_state_dtype(q)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, return_final_state, recurrent, backend = inputs
    _, final_state, g_cumsum, inverse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(g_cumsum, inverse, *([] if return_final_state else [final_state]))
    ctx.save_for_backward(*tensors, g_cumsum, inverse)
    ctx.scale, ctx.recurrent, ctx.backend = scale, recurrent, backend


def _backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.recurrent and ctx.backend == "fla":
        raise RuntimeError("gated_delta_rule: the recurrent kernel has no backward; pass recurrent=False")
    saved = ctx.saved_tensors  # once: under activation checkpointing a second unpacking is an error
    initial_state = saved[5]
    *grads, dinitial_state = _gated_delta_rule_backward(do, dfinal_state, *saved, ctx.scale, ctx.backend)
    return (*grads, None if initial_state is None else dinitial_state, None, None, None, None, None, None)


_gated_delta_rule.register_autograd(_backward, setup_context=_setup_context)


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, backend: str
) -> None:
    name = "gated_delta_rule"
    if backend not in ("reference", "fla"):
        raise ValueError(f"{name}: backend is {backend!r}, must be 'reference' or 'fla' (see resolve_backend)")
    if q.dim() != 4 or v.dim() != 4 or q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        raise ValueError(f"{name}: q and k are (B, L, H, K) and v is (B, L, HV, V), got {_shapes(q, k, v)}")
    if v.shape[2] % q.shape[2] != 0:
        raise ValueError(f"{name}: {v.shape[2]} value heads are not a multiple of {q.shape[2]} key heads")
    if g.shape != v.shape[:3] or beta.shape != v.shape[:3]:
        raise ValueError(f"{name}: g and beta are (B, L, HV) = {tuple(v.shape[:3])}, got {_shapes(g, beta)}")
    if q.shape[1] == 0:
        raise ValueError(f"{name}: no tokens (L = 0)")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{name}: q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if initial_state is not None:
        expected = (v.shape[2], k.shape[-1], v.shape[-1])
        if initial_state.shape[1:] != expected or initial_state.dtype != _state_dtype(q):
            raise ValueError(
                f"{name}: initial_state is (N, HV, K, V) = (N, {', '.join(map(str, expected))}) in {_state_dtype(q)}, "
                f"got {tuple(initial_state.shape)} in {initial_state.dtype}"
            )
    if backend == "fla" and (k.shape[-1] > 256 or q.dtype == torch.float64):
        raise ValueError(
            f"{name}: fla takes key heads up to 256 wide in bf16, fp16 or fp32, got {k.shape[-1]} in {q.dtype}; "
            "use narrower heads or kernels.backend=reference"
        )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)
