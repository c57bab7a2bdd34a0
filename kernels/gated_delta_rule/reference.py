"""The gated delta rule in plain PyTorch: token by token (the definition) and in chunks (fast enough to train on a CPU).

Gated Delta Networks, arXiv 2412.06464, equation 10, with the state stored as (K, V):

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale S_t^T q_t

Shapes: B batch, L tokens, H key heads, HV value heads (a multiple of H), K and V head widths, N sequences (B, or the
number of packed documents), M chunks in all, C tokens per chunk. Computed in fp32, or in fp64 for fp64 inputs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.packing import check_cu_seqlens

CHUNK = 32  # fastest of 16, 32, 64 and 128 for training on two CPU cores
RECURRENT_MAX_LENGTH = 4  # up to here the token loop launches fewer operations than the chunked form


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `gated_delta_rule`. Returns (output in v's dtype, final state in fp32 or fp64)."""
    if cu_seqlens is None and q.shape[1] <= RECURRENT_MAX_LENGTH:
        return recurrent_gated_delta_rule(q, k, v, g, beta, initial_state, None, scale)
    return chunked_gated_delta_rule(q, k, v, g, beta, initial_state, cu_seqlens, scale)


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another: the truth that everything else is tested against."""
    if cu_seqlens is not None:
        outputs, finals = [], []
        for n, (start, end) in enumerate(pairwise(check_cu_seqlens(cu_seqlens, q.shape[1]))):
            q_n, k_n, v_n, g_n, beta_n = (x[:, start:end] for x in (q, k, v, g, beta))
            state = None if initial_state is None else initial_state[n : n + 1]
            o, final = recurrent_gated_delta_rule(q_n, k_n, v_n, g_n, beta_n, state, None, scale)
            outputs.append(o)
            finals.append(final)
        return torch.cat(outputs, dim=1), torch.cat(finals)

    dtype = _compute_dtype(q)
    group = v.shape[2] // k.shape[2]
    q, k = (x.to(dtype).repeat_interleave(group, dim=2) for x in (q, k))
    out_dtype, v, decay, beta = v.dtype, v.to(dtype), g.to(dtype).exp(), beta.to(dtype)
    state = _first_state(initial_state, v.shape[0], k, v)  # (B, HV, K, V)
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
    """The same function computed chunk by chunk: everything inside the chunks in a few batched products."""
    dtype = _compute_dtype(q)
    group = v.shape[2] // k.shape[2]
    out_dtype = v.dtype
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g.unsqueeze(-1), beta.unsqueeze(-1)))
    q = q * scale
    if group > 1:
        q, k = q.repeat_interleave(group, dim=2), k.repeat_interleave(group, dim=2)

    if cu_seqlens is None:
        n_sequences, length = v.shape[:2]
        size = min(CHUNK, length)
        n_chunks = -(-length // size)
        pad = n_chunks * size - length

        def to_chunks(x: Tensor) -> Tensor:
            # (B, L, HV, D) -> (M, HV, C, D), first the first chunk of every row
            x = F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (n_chunks, size))
            return x.permute(1, 0, 3, 2, 4).flatten(0, 1).contiguous()

        def to_tokens(x: Tensor) -> Tensor:
            x = x.unflatten(0, (n_chunks, n_sequences)).permute(1, 0, 3, 2, 4)
            return x.flatten(1, 2)[:, :length]

        state = _first_state(initial_state, n_sequences, k, v)
        q, k, v, g, beta = map(to_chunks, (q, k, v, g, beta))
        o, final = _scan_chunks(q, k, v, g, beta, state, [n_sequences] * n_chunks)
        return to_tokens(o).to(out_dtype), final

    layout = _PackedLayout(check_cu_seqlens(cu_seqlens, q.shape[1]), q.device)
    state = _first_state(initial_state, layout.order.numel(), k, v)
    q, k, v, g, beta = map(layout.to_chunks, (q, k, v, g, beta))
    o, final = _scan_chunks(q, k, v, g, beta, state.index_select(0, layout.order), layout.n_active)
    return layout.to_tokens(o).to(out_dtype), final.index_select(0, layout.order.argsort())


def _scan_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, n_active: list[int]
) -> tuple[Tensor, Tensor]:
    """Run chunks (M, HV, C, D), g and beta with D = 1, from `state` (N, HV, K, V); q is already scaled.

    Chunks come step by step, like a packed sequence of an RNN: the first chunk of every sequence, then the second of
    those that have one, and so on; sequences are sorted from long to short, and `n_active[j]` of them have a chunk j.

    Inside a chunk that starts from state S, with G the running sum of g, the corrections u of all tokens solve
    (I + A) u = beta (v - exp(G) k S),  A_ti = beta_t exp(G_t - G_i) k_t.k_i for i < t  (the WY form of the product of
    Householder-like factors). So u = u0 - w S, and the state after the chunk is again linear in S.
    """
    total = g.cumsum(dim=2)  # G, (M, HV, C, 1)
    last = total[:, :, -1:]
    size = v.shape[2]
    future = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1)
    ratio = (total - total.mT).masked_fill(future, -torch.inf).exp()  # exp(G_t - G_i), 0 for i > t
    from_start = total.exp()

    interaction = (k @ k.mT) * ratio * beta  # its diagonal is ignored by the unitriangular solve
    identity = torch.eye(size, dtype=k.dtype, device=k.device).expand_as(interaction)
    inverse = torch.linalg.solve_triangular(interaction, identity, upper=False, unitriangular=True)
    u0 = inverse @ (v * beta)
    w = inverse @ (k * (from_start * beta))

    k_to_end = (k * (last - total).exp()).mT
    transition = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) * last.exp() - k_to_end @ w  # (M, HV, K, K)
    update = k_to_end @ u0  # (M, HV, K, V)

    steps = zip(update.split(n_active), transition.split(n_active), [*n_active[1:], 0], strict=True)
    ended, state = [state[n_active[0] :]], state[: n_active[0]]  # empty documents end where they start
    before: list[Tensor] = []  # the states that each step's chunks start from
    for step_update, step_transition, n_next in steps:
        before.append(state)
        state = step_update + step_transition @ state
        ended.append(state[n_next:])
        state = state[:n_next]
    starts = torch.cat(before)  # (M, HV, K, V)

    u = u0 - w @ starts
    o = (q * from_start) @ starts + ((q @ k.mT) * ratio) @ u
    return o, torch.cat(ended[::-1])


class _PackedLayout:
    """Where the tokens of packed documents go when every document is cut into chunks (padded with empty tokens)."""

    def __init__(self, bounds: list[int], device: torch.device) -> None:
        starts, ends = torch.tensor(bounds[:-1]), torch.tensor(bounds[1:])
        lengths = ends - starts
        self.size = min(CHUNK, max(int(lengths.max()), 1))
        self.n_tokens = bounds[-1]
        order = lengths.argsort(descending=True, stable=True)
        counts = (lengths[order] + self.size - 1) // self.size
        self.n_active: list[int] = [int((counts > j).sum()) for j in range(int(counts[0]))]
        first = torch.cat([starts[order[:n]] + j * self.size for j, n in enumerate(self.n_active)])
        last = torch.cat([ends[order[:n]] for n in self.n_active])
        token = first[:, None] + torch.arange(self.size)
        self.n_chunks = token.shape[0]
        used = token < last[:, None]
        token = torch.where(used, token, self.n_tokens)  # row n_tokens is the empty token
        slots = used.flatten().nonzero().squeeze(1)
        slot_of_token = torch.empty(self.n_tokens, dtype=torch.long)
        slot_of_token[token.flatten()[slots]] = slots
        self.order = order.to(device)
        self._token = token.flatten().to(device)
        self._slot_of_token = slot_of_token.to(device)

    def to_chunks(self, x: Tensor) -> Tensor:
        """(1, L, HV, D) -> (M, HV, C, D)."""
        rows = F.pad(x[0], (0, 0, 0, 0, 0, 1)).index_select(0, self._token)
        return rows.unflatten(0, (self.n_chunks, self.size)).transpose(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """(M, HV, C, D) -> (1, L, HV, D)."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self._slot_of_token).unsqueeze(0)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _first_state(initial_state: Tensor | None, n_sequences: int, k: Tensor, v: Tensor) -> Tensor:
    if initial_state is not None:
        return initial_state.to(v.dtype)
    return v.new_zeros(n_sequences, v.shape[2], k.shape[-1], v.shape[-1])
