"""The DPLR delta rule in plain PyTorch: token by token (the definition) and in chunks (fast enough to train on a CPU).

RWKV-7, arXiv 2503.14456, equation 17, with the state stored as (K, V); the transition is diagonal plus low rank:

    S_t = (Diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

Shapes: B batch, L tokens, H heads, K and V head widths, M chunks in all, C tokens per chunk. Computed in fp32, or in
fp64 for fp64 inputs. Right for any g <= 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.chunking import ChunkLayout, decay_ratios, each_document, first_state, reference_of
from lt2titan.kernels.recurrence import state_dtype

CHUNK = 16  # the decay ratios of a chunk are C x C x K numbers


def recurrent_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another: the truth that everything else is tested against."""
    if cu_seqlens is not None:
        return each_document(recurrent_dplr_delta_rule, (q, k, v, a, b, g), initial_state, cu_seqlens, scale)
    out_dtype, dtype = v.dtype, state_dtype(q)
    q, k, v, a, b, decay = (x.to(dtype) for x in (q, k, v, a, b, g.to(dtype).exp()))
    state = first_state(initial_state, v.shape[0], k, v)  # (B, H, K, V)
    outputs = []
    for t in range(v.shape[1]):
        read = a[:, t].unsqueeze(-2) @ state  # (B, H, 1, V)
        state = decay[:, t].unsqueeze(-1) * state
        state = state + b[:, t].unsqueeze(-1) * read + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2) * scale)
    o = torch.stack(outputs, dim=1) if outputs else v
    return o.to(out_dtype), state


def chunked_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same function computed chunk by chunk: everything inside the chunks in a few batched products.

    Inside a chunk that starts from state S, with G the running sum of g and G^- = G - g, what the tokens read,
    u_t = a_t^T S_{t-1}, solves (I - A_ab) u = exp(G^-) a S + A_ak v, where the products between tokens carry the decay
    on the way, A_xy[t, i] = sum_k x_tk exp(G_tk - G_ik) y_ik (G^- for a). So u = u0 + w S, and the state after the
    chunk is again linear in S.
    """
    dtype, out_dtype = state_dtype(q), v.dtype
    layout = ChunkLayout(v, cu_seqlens, CHUNK)
    state = first_state(initial_state, layout.n_sequences, k, v.to(dtype))
    q, k, v, a, b, g = (layout.to_chunks(x.to(dtype)) for x in (q * scale, k, v, a, b, g))  # (M, H, C, D)

    total = g.cumsum(dim=2)  # G, (M, H, C, K)
    from_start, to_end = total.exp(), (total[:, :, -1:] - total).exp()
    before = F.pad(total[:, :, :-1], (0, 0, 1, 0))  # G^-, as the sum up to the token before: never G - g, which rounds

    # exp(G^-_t - G_i) is the ratio of the row before, so that the a of the next token goes with the q of this one.
    ratio = decay_ratios(total)
    readers = torch.stack([q, F.pad(a[:, :, 1:], (0, 0, 0, 1))], dim=-1)  # (M, H, C, K, 2)
    qb, ab = (ratio * b.unsqueeze(2) @ readers).unbind(-1)  # (M, H, C, C) each
    qk, ak = (ratio * k.unsqueeze(2) @ readers).unbind(-1)
    ab, ak = (F.pad(x[:, :, :-1], (0, 0, 1, 0)) for x in (ab, ak))

    identity = torch.eye(layout.size, dtype=dtype, device=k.device).expand_as(ab)
    inverse = torch.linalg.solve_triangular(identity - ab, identity, upper=False, unitriangular=True)
    u0 = inverse @ (ak @ v)
    w = inverse @ (a * before.exp())

    b_end, k_end = (b * to_end).mT, (k * to_end).mT
    transition = torch.diag_embed(from_start[:, :, -1]) + b_end @ w  # (M, H, K, K)
    update = b_end @ u0 + k_end @ v  # (M, H, K, V)
    starts, final = layout.scan(state, lambda rows, s: update[rows] + transition[rows] @ s)

    o = (q * from_start) @ starts + qb @ (u0 + w @ starts) + qk @ v
    return layout.to_tokens(o).to(out_dtype), final


dplr_delta_rule_reference = reference_of(recurrent_dplr_delta_rule, chunked_dplr_delta_rule)
