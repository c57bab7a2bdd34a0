"""Kimi delta attention in plain PyTorch: token by token (the definition) and in chunks (to train on a CPU).

Kimi Linear, arXiv 2510.26692, equation 1, with the state stored as (K, V):

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = scale S_t^T q_t

Shapes: B batch, L tokens, H key heads, HV value heads (a multiple of H), K and V head widths, M chunks in all, C tokens
per chunk. Computed in fp32, or in fp64 for fp64 inputs. Right for any g <= 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.kernels.chunking import ChunkLayout, decay_ratios, each_document, first_state, reference_of
from lt2titan.kernels.recurrence import state_dtype

CHUNK = 16  # the decay ratios of a chunk are C x C x K numbers


def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another: the truth that everything else is tested against."""
    if cu_seqlens is not None:
        return each_document(recurrent_kda, (q, k, v, g, beta), initial_state, cu_seqlens, scale)
    out_dtype, dtype = v.dtype, state_dtype(q)
    group = v.shape[2] // k.shape[2]
    q, k = (x.to(dtype).repeat_interleave(group, dim=2) for x in (q, k))
    v, decay, beta = v.to(dtype), g.to(dtype).exp(), beta.to(dtype)
    state = first_state(initial_state, v.shape[0], k, v)  # (B, HV, K, V)
    outputs = []
    for t in range(v.shape[1]):
        q_t, k_t = q[:, t].unsqueeze(-2), k[:, t].unsqueeze(-2)  # (B, HV, 1, K)
        state = decay[:, t].unsqueeze(-1) * state
        correction = beta[:, t, :, None, None] * (v[:, t].unsqueeze(-2) - k_t @ state)  # (B, HV, 1, V)
        state = state + k_t.mT * correction
        outputs.append((q_t @ state).squeeze(-2) * scale)
    o = torch.stack(outputs, dim=1) if outputs else v
    return o.to(out_dtype), state


def chunked_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same function computed chunk by chunk: everything inside the chunks in a few batched products.

    As the gated delta rule, with a decay per channel that no longer factors out of the products between tokens: inside
    a chunk that starts from state S, with G the running sum of g, the corrections u of all tokens solve
    (I + A) u = beta (v - exp(G) k S),  A_ti = beta_t sum_k k_tk exp(G_tk - G_ik) k_ik for i < t.
    """
    dtype, out_dtype = state_dtype(q), v.dtype
    group = v.shape[2] // k.shape[2]
    q, k, v, g, beta = (x.to(dtype) for x in (q * scale, k, v, g, beta.unsqueeze(-1)))
    if group > 1:
        q, k = q.repeat_interleave(group, dim=2), k.repeat_interleave(group, dim=2)
    layout = ChunkLayout(v, cu_seqlens, CHUNK)
    state = first_state(initial_state, layout.n_sequences, k, v)
    q, k, v, g, beta = map(layout.to_chunks, (q, k, v, g, beta))  # (M, HV, C, D), beta with D = 1

    total = g.cumsum(dim=2)  # G, (M, HV, C, K)
    from_start, to_end = total.exp(), (total[:, :, -1:] - total).exp()
    scores, interaction = (decay_ratios(total) * k.unsqueeze(2) @ torch.stack([q, k], dim=-1)).unbind(-1)

    identity = torch.eye(layout.size, dtype=dtype, device=k.device).expand_as(interaction)
    # The diagonal is ignored by the unitriangular solve.
    inverse = torch.linalg.solve_triangular(interaction * beta, identity, upper=False, unitriangular=True)
    u0 = inverse @ (v * beta)
    w = inverse @ (k * from_start * beta)

    k_end = (k * to_end).mT
    transition = torch.diag_embed(from_start[:, :, -1]) - k_end @ w  # (M, HV, K, K)
    update = k_end @ u0  # (M, HV, K, V)
    starts, final = layout.scan(state, lambda rows, s: update[rows] + transition[rows] @ s)

    o = (q * from_start) @ starts + scores @ (u0 - w @ starts)
    return layout.to_tokens(o).to(out_dtype), final


kda_reference = reference_of(recurrent_kda, chunked_kda)
