"""The gated delta rule in plain PyTorch: token by token (the definition) and in chunks (fast enough to train on a CPU).

Gated Delta Networks, arXiv 2412.06464, equation 10, with the state stored as (K, V):

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale S_t^T q_t

Shapes: B batch, L tokens, H key heads, HV value heads (a multiple of H), K and V head widths, M chunks in all, C tokens
per chunk. Computed in fp32, or in fp64 for fp64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.kernels.chunking import ChunkLayout, causal, each_document, first_state, reference_of
from lt2titan.kernels.recurrence import state_dtype

CHUNK = 32  # fastest of 16, 32, 64 and 128 for training on two CPU cores


def recurrent_gated_delta_rule(
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
        return each_document(recurrent_gated_delta_rule, (q, k, v, g, beta), initial_state, cu_seqlens, scale)
    dtype = state_dtype(q)
    group = v.shape[2] // k.shape[2]
    q, k = (x.to(dtype).repeat_interleave(group, dim=2) for x in (q, k))
    out_dtype, v, decay, beta = v.dtype, v.to(dtype), g.to(dtype).exp(), beta.to(dtype)
    state = first_state(initial_state, v.shape[0], k, v)  # (B, HV, K, V)
    outputs = []
    for t in range(v.shape[1]):
        q_t, k_t = q[:, t].unsqueeze(-2), k[:, t].unsqueeze(-2)  # (B, HV, 1, K)
        state = state * decay[:, t, :, None, None]
        correction = beta[:, t, :, None, None] * (v[:, t].unsqueeze(-2) - k_t @ state)  # (B, HV, 1, V)
        state = state + k_t.mT * correction
        outputs.append((q_t @ state).squeeze(-2) * scale)
    o = torch.stack(outputs, dim=1) if outputs else v
    return o.to(out_dtype), state


def chunked_gated_delta_rule(
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

    Inside a chunk that starts from state S, with G the running sum of g, the corrections u of all tokens solve
    (I + A) u = beta (v - exp(G) k S),  A_ti = beta_t exp(G_t - G_i) k_t.k_i for i < t  (the WY form of the product of
    Householder-like factors). So u = u0 - w S, and the state after the chunk is again linear in S.
    """
    dtype = state_dtype(q)
    group = v.shape[2] // k.shape[2]
    out_dtype = v.dtype
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g.unsqueeze(-1), beta.unsqueeze(-1)))
    q = q * scale
    if group > 1:
        q, k = q.repeat_interleave(group, dim=2), k.repeat_interleave(group, dim=2)
    layout = ChunkLayout(v, cu_seqlens, CHUNK)
    state = first_state(initial_state, layout.n_sequences, k, v)
    q, k, v, g, beta = map(layout.to_chunks, (q, k, v, g, beta))  # (M, HV, C, D), g and beta with D = 1

    total = g.cumsum(dim=2)  # G, (M, HV, C, 1)
    last = total[:, :, -1:]
    ratio = (total - total.mT).masked_fill(~causal(layout.size, v.device), -torch.inf).exp()  # exp(G_t - G_i), i <= t
    from_start = total.exp()

    interaction = (k @ k.mT) * ratio * beta  # its diagonal is ignored by the unitriangular solve
    identity = torch.eye(layout.size, dtype=dtype, device=k.device).expand_as(interaction)
    inverse = torch.linalg.solve_triangular(interaction, identity, upper=False, unitriangular=True)
    u0 = inverse @ (v * beta)
    w = inverse @ (k * (from_start * beta))

    k_to_end = (k * (last - total).exp()).mT
    transition = torch.eye(k.shape[-1], dtype=dtype, device=k.device) * last.exp() - k_to_end @ w  # (M, HV, K, K)
    update = k_to_end @ u0  # (M, HV, K, V)
    starts, final = layout.scan(state, lambda rows, s: update[rows] + transition[rows] @ s)

    u = u0 - w @ starts
    o = (q * from_start) @ starts + ((q @ k.mT) * ratio) @ u
    return layout.to_tokens(o).to(out_dtype), final


gated_delta_rule_reference = reference_of(recurrent_gated_delta_rule, chunked_gated_delta_rule)
