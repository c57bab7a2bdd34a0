"""Linear attention with a scalar decay per head in plain PyTorch: token by token (the definition) and in chunks.

Retentive Network, arXiv 2307.08621, equation 6 (there the decay is a constant of the head), and Mamba-2's state space
duality, arXiv 2405.21060, equation 15 (q = C, k = B, v = dt x), with the state stored as (K, V):

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

Shapes: B batch, L tokens, H key heads, HV value heads (a multiple of H), K and V head widths, M chunks in all, C tokens
per chunk. Computed in fp32, or in fp64 for fp64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.kernels.chunking import ChunkLayout, causal, each_document, first_state, reference_of
from lt2titan.kernels.recurrence import state_dtype

CHUNK = 32  # fastest of 16, 32, 64 and 128 for training on a CPU at the debug model's sizes


def recurrent_simple_gla(
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
        return each_document(recurrent_simple_gla, (q, k, v, g), initial_state, cu_seqlens, scale)
    dtype = state_dtype(q)
    group = v.shape[2] // k.shape[2]
    q, k = (x.to(dtype).repeat_interleave(group, dim=2) for x in (q, k))
    out_dtype, v, decay = v.dtype, v.to(dtype), g.to(dtype).exp()
    state = first_state(initial_state, v.shape[0], k, v)  # (B, HV, K, V)
    outputs = []
    for t in range(v.shape[1]):
        state = state * decay[:, t, :, None, None] + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2) * scale)
    o = torch.stack(outputs, dim=1) if outputs else v
    return o.to(out_dtype), state


def chunked_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same function computed chunk by chunk: everything inside the chunks in a few batched products.

    Inside a chunk that starts from state S, with G the running sum of g,
    o_t = exp(G_t) q_t S + sum_{i <= t} exp(G_t - G_i) (q_t.k_i) v_i. No exponent is positive, whatever the decays.
    """
    dtype = state_dtype(q)
    group = v.shape[2] // k.shape[2]
    out_dtype = v.dtype
    q, k, v, g = (x.to(dtype) for x in (q, k, v, g.unsqueeze(-1)))
    q = q * scale
    if group > 1:
        q, k = q.repeat_interleave(group, dim=2), k.repeat_interleave(group, dim=2)
    layout = ChunkLayout(v, cu_seqlens, CHUNK)
    state = first_state(initial_state, layout.n_sequences, k, v)
    q, k, v, g = map(layout.to_chunks, (q, k, v, g))  # (M, HV, C, D), g with D = 1

    total = g.cumsum(dim=2)  # G, (M, HV, C, 1)
    last = total[:, :, -1:]
    ratio = (total - total.mT).masked_fill(~causal(layout.size, v.device), -torch.inf).exp()  # exp(G_t - G_i), i <= t
    update = (k * (last - total).exp()).mT @ v  # (M, HV, K, V)
    decay = last.exp()
    starts, final = layout.scan(state, lambda rows, s: decay[rows] * s + update[rows])
    o = (q * total.exp()) @ starts + ((q @ k.mT) * ratio) @ v
    return layout.to_tokens(o).to(out_dtype), final


simple_gla_reference = reference_of(recurrent_simple_gla, chunked_simple_gla)
