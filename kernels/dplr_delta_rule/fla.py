"""The DPLR delta rule on a GPU: flash-linear-attention's inner functions (Triton), in chunks of 64 on tensor cores.

The public function of fla is not called: it is hidden from torch.compile and carries its own autograd. fla and triton
are imported inside the functions, so that this package works without them. The backward computes everything inside
the chunks anew, as fla does: kept, it would be a dozen tensors the size of q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    from fla.ops.generalized_delta_rule.dplr.chunk_h_fwd import chunk_dplr_fwd_h
    from fla.ops.generalized_delta_rule.dplr.chunk_o_fwd import chunk_dplr_fwd_o

    inputs = [contiguous(x) for x in inputs]
    where = _where(cu_seqlens, chunk_indices)
    v = inputs[2]
    c = _inside_chunks(inputs, where, scale)
    h, v_new, final_state = chunk_dplr_fwd_h(
        kg=c.kg,
        bg=c.bg,
        v=v,
        w=c.w,
        u=c.u,
        gk=c.gi,
        initial_state=contiguous(initial_state),
        output_final_state=return_final_state,
        **where,
    )
    o = chunk_dplr_fwd_o(qg=c.qg, v=v, v_new=v_new, A_qk=c.A_qk, A_qb=c.A_qb, h=h, **where)
    return o.to(v.dtype), final_state, []


def empty_saved(inputs: Sequence[Tensor]) -> list[Tensor]:
    return []


def forward_recurrent(
    inputs: Sequence[Tensor], initial_state: Tensor | None, scale: float, return_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    from fla.ops.generalized_delta_rule.dplr.fused_recurrent import fused_recurrent_dplr_delta_rule_fwd

    q, k, v, a, b, g = map(contiguous, inputs)
    return fused_recurrent_dplr_delta_rule_fwd(
        q=q,
        k=k,
        v=v,
        a=a,
        b=b,
        gk=g,
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
    from fla.ops.generalized_delta_rule.dplr.chunk_A_bwd import chunk_dplr_bwd_dqk_intra
    from fla.ops.generalized_delta_rule.dplr.chunk_h_bwd import chunk_dplr_bwd_dhu
    from fla.ops.generalized_delta_rule.dplr.chunk_h_fwd import chunk_dplr_fwd_h
    from fla.ops.generalized_delta_rule.dplr.chunk_o_bwd import (
        chunk_dplr_bwd_dAu,
        chunk_dplr_bwd_dv,
        chunk_dplr_bwd_o,
    )
    from fla.ops.generalized_delta_rule.dplr.wy_fast_bwd import chunk_dplr_bwd_wy

    inputs = [contiguous(x) for x in inputs]
    initial_state, do = contiguous(initial_state), contiguous(do)
    where = _where(cu_seqlens, chunk_indices)
    q, k, v, a, b, _ = inputs
    c = _inside_chunks(inputs, where, scale)
    h, v_new, _ = chunk_dplr_fwd_h(kg=c.kg, bg=c.bg, v=v, w=c.w, u=c.u, gk=c.gi, initial_state=initial_state, **where)
    dv_inside, dA_qk, dA_qb = chunk_dplr_bwd_dAu(v=v, v_new=v_new, do=do, A_qb=c.A_qb, scale=scale, **where)
    dh, dinitial_state, dv_new = chunk_dplr_bwd_dhu(
        qg=c.qg,
        bg=c.bg,
        w=c.w,
        gk=c.gi,
        h0=initial_state,
        dht=contiguous(dfinal_state),
        do=do,
        dv=dv_inside,
        **where,
    )
    dv = chunk_dplr_bwd_dv(A_qk=c.A_qk, kg=c.kg, do=do, dh=dh, **where)
    dqg, dkg, dw, dbg, dgk_last = chunk_dplr_bwd_o(
        k=c.kg, b=c.bg, v=v, v_new=v_new, do=do, h=h, dh=dh, dv=dv_new, w=c.w, gk=c.gi, scale=scale, **where
    )
    dA_ab, dA_ak, dv, dag = chunk_dplr_bwd_wy(
        A_ab_inv=c.A_ab_inverse, A_ak=c.A_ak, v=v, ag=c.ag, dw=dw, du=dv_new, dv0=dv, **where
    )
    dq, dk, da, db, dg = chunk_dplr_bwd_dqk_intra(
        q=q,
        k=k,
        a=a,
        b=b,
        gi=c.gi,
        ge=c.ge,
        dAqk=dA_qk,
        dAqb=dA_qb,
        dAak=dA_ak,
        dAab=dA_ab,
        dgk_last=dgk_last,
        dqg=dqg,
        dkg=dkg,
        dag=dag,
        dbg=dbg,
        scale=scale,
        safe_gate=True,
        **where,
    )
    return (dq, dk, dv, da, db, dg), dinitial_state


class _Chunks(NamedTuple):
    """What is computed of every chunk without its state. gi, ge: inclusive and exclusive running sums of g in log2;
    A_xy: products between tokens; qg .. bg: inputs times their decays from the chunk's start or to its end; w, u: what
    the chunk's tokens read is u + w S."""

    gi: Tensor
    ge: Tensor
    A_qk: Tensor
    A_qb: Tensor
    A_ak: Tensor
    A_ab_inverse: Tensor
    qg: Tensor
    kg: Tensor
    ag: Tensor
    bg: Tensor
    w: Tensor
    u: Tensor


def _inside_chunks(inputs: Sequence[Tensor], where: dict[str, Any], scale: float) -> _Chunks:
    from fla.ops.generalized_delta_rule.dplr.chunk_A_fwd import chunk_dplr_fwd_intra
    from fla.ops.generalized_delta_rule.dplr.wy_fast_fwd import prepare_wy_repr_fwd
    from fla.ops.rwkv6.chunk import chunk_rwkv6_fwd_cumsum
    from fla.ops.utils.constant import RCP_LN2

    q, k, v, a, b, g = inputs
    gi, ge = chunk_rwkv6_fwd_cumsum(g, scale=RCP_LN2, **where)
    A_ab, A_qk, A_ak, A_qb, qg, kg, ag, bg = chunk_dplr_fwd_intra(
        q=q, k=k, a=a, b=b, gi=gi, ge=ge, scale=scale, safe_gate=True, **where
    )
    # fla's fast inverse of I - A_ab works in fp16: good enough beside bf16 inputs, not beside fp32 ones.
    fast = q.dtype != torch.float32
    w, u, A_ab_inverse = prepare_wy_repr_fwd(ag=ag, A_ab=A_ab, A_ak=A_ak, v=v, safe_gate=fast, **where)
    return _Chunks(gi, ge, A_qk, A_qb, A_ak, A_ab_inverse, qg, kg, ag, bg, w, u)


def _where(cu_seqlens: Tensor | None, chunk_indices: Tensor | None) -> dict[str, Any]:
    cu_seqlens, chunk_indices = for_fla(cu_seqlens, chunk_indices)
    return {"cu_seqlens": cu_seqlens, "chunk_indices": chunk_indices, "chunk_size": CHUNK_SIZE}
