"""Gated linear attention in plain PyTorch: token by token (the definition) and in chunks (to train on a CPU).

Gated Linear Attention Transformers, arXiv 2312.06635, equation 3 with the state stored as (K, V):

    S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

Shapes: B batch, L tokens, H heads, K and V head widths, M chunks in all, C tokens per chunk. Computed in fp32, or in
fp64 for fp64 inputs. Right for any g <= 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.kernels.chunking import ChunkLayout, decay_ratios, each_document, first_state, reference_of
from lt2titan.kernels.recurrence import state_dtype

CHUNK = 16  # the decay ratios of a chunk are C x C x K numbers


def recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another: the truth that everything else is tested against."""
    if cu_seqlens is not None:
        return each_document(recurrent_gla, (q, k, v, g), initial_state, cu_seqlens, scale)
    out_dtype, dtype = v.dtype, state_dtype(q)
    q, k, v, decay = q.to(dtype), k.to(dtype), v.to(dtype), g.to(dtype).exp()
    state = first_state(initial_state, v.shape[0], k, v)  # (B, H, K, V)
    outputs = []
    for t in range(v.shape[1]):
        state = decay[:, t].unsqueeze(-1) * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2) * scale)
    o = torch.stack(outputs, dim=1) if outputs else v
    return o.to(out_dtype), state


def chunked_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same function computed chunk by chunk: everything inside the chunks in a few batched products.

    In a chunk that starts from state S, with G the running sum of g,
    o_t = (q_t exp(G_t)) S + sum over i <= t of A_ti v_i,  A_ti = sum over k of q_tk exp(G_tk - G_ik) k_ik.
    The ratios are formed as they stand: split into exp(G_t) exp(-G_i) they would overflow.
    """
    out_dtype = v.dtype
    q, k, v, g = (x.to(state_dtype(q)) for x in (q, k, v, g))
    layout = ChunkLayout(v, cu_seqlens, CHUNK)
    state = first_state(initial_state, layout.n_sequences, k, v)
    q, k, v, g = map(layout.to_chunks, (q * scale, k, v, g))  # (M, H, C, D)

    total = g.cumsum(dim=2)  # G
    last = total[:, :, -1:]
    scores = (decay_ratios(total) * k.unsqueeze(2) * q.unsqueeze(3)).sum(-1)  # (M, H, C, C), summed over K

    update = (k * (last - total).exp()).mT @ v  # (M, H, K, V)
    decay = last.mT.exp()  # (M, H, K, 1)
    starts, final = layout.scan(state, lambda rows, s: decay[rows] * s + update[rows])

    o = (q * total.exp()) @ starts + scores @ v
    return layout.to_tokens(o).to(out_dtype), final


gla_reference = reference_of(recurrent_gla, chunked_gla)
