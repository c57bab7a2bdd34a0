"""Softmax attention with RoPE, grouped queries and an optional output gate."""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.kernels.attention import attention, masked_attention
from lt2titan.kernels.attention.ring import ring_attention
from lt2titan.model.attention_mass import first_token_mass
from lt2titan.model.context import Carry, Context, apply_rotary
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import FullConfig, WindowConfig
from lt2titan.model.mixers.rows import DocumentRows
from lt2titan.model.stretch import with_earlier_keys

QUERY_BLOCK = 1024
"""New tokens whose scores are masked at a time when a decode state is continued: the mask never has L x L entries."""


class Full(Mixer):
    """Attention over all earlier tokens; no QK norm, no biases (LT2, arXiv 2605.20670, appendix C).

    The output gate multiplies the heads' concatenated outputs by sigmoid(W_g x), W_g zero-initialised so that it
    starts at 1/2 (arXiv 2505.06708).
    """

    window = 0

    def __init__(self, config: FullConfig | WindowConfig, common: Common) -> None:
        super().__init__()
        dim = common.dim
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        self.head_dim = self.rotary_dim = dim // config.n_heads
        self.backend = common.backend
        self.q_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.k_proj = Linear(dim, self.n_kv_heads * self.head_dim, init_std=dim**-0.5)
        self.v_proj = Linear(dim, self.n_kv_heads * self.head_dim, init_std=dim**-0.5)
        self.o_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.gate_proj = Linear(dim, dim, init_std=0.0) if config.output_gate else None

    def forward(self, x: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        tables = context.rotary[self.head_dim]
        q = apply_rotary(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), tables)
        k = apply_rotary(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), tables)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        window = self.window if context.window is None else context.window
        if state is None:
            y = self._attend(q, k, v, context, window)
        else:
            y = cached_attention(q, k, v, context, window, state)
        y = y.flatten(-2)
        if self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(y), carry

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context, window: int) -> Tensor:
        stretch, cu_seqlens_k = context.stretch, context.cu_seqlens
        if stretch is not None and stretch.is_ring:
            return ring_attention(q, k, v, stretch.share.group)
        if stretch is not None:
            k, v = with_earlier_keys(k, v, stretch)
            cu_seqlens_k = stretch.cu_seqlens_k
        return attention(
            q,
            k,
            v,
            window=window,
            cu_seqlens=context.cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen=context.max_seqlen,
            backend=self.backend,
        )

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        rows = ["q_proj.weight", "k_proj.weight", "v_proj.weight"]
        if self.gate_proj is not None:
            rows.append("gate_proj.weight")
        return {**dict.fromkeys(rows, 0), "o_proj.weight": 1}

    def first_token_mass(self, x: Tensor, context: Context, queries: Tensor, counted: Tensor) -> Tensor:
        """Of ``queries`` (n,), where ``counted`` (B, n): see model/attention_mass.py. x (B, L, dim) as in forward."""
        tables = context.rotary[self.head_dim]
        q = apply_rotary(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), tables)
        k = apply_rotary(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), tables)
        window = self.window if context.window is None else context.window
        cu_seqlens_k = context.cu_seqlens
        if context.stretch is not None:
            k, _ = with_earlier_keys(k, k, context.stretch)
            cu_seqlens_k = context.stretch.cu_seqlens_k
        return first_token_mass(q, k, window, context.cu_seqlens, cu_seqlens_k, queries, counted)

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        window = self.window if window is None else window
        capacity = min(window, max_length) if window else max_length
        shape = (batch_size, capacity, self.n_kv_heads, self.head_dim)
        positions = StateSpec((batch_size, capacity), torch.int64, fill=-1)
        return {"k": StateSpec(shape), "v": StateSpec(shape), "positions": positions}

    def attention_flops(self, seq_len: int, window: int | None) -> float:
        window = self.window if window is None else window
        n = min(window, seq_len) if window else seq_len
        mean_keys = n - n * n / (2 * seq_len)  # the causal triangle, cut off at the window
        return 4 * self.n_heads * self.head_dim * mean_keys


def cached_attention(q: Tensor, k: Tensor, v: Tensor, context: Context, window: int, state: State) -> Tensor:
    """Attention of new tokens (B, L, ...) over those in ``state`` and themselves; then ``state`` holds them too.

    Row b continues sequence b of the state; with packed documents (B is 1), document n continues sequence n.

    The state is a ring: the token at position p stands in slot p mod capacity, and ``state["positions"]`` says which
    position each slot holds (-1: none). A window's ring is as long as the window, so it forgets what is out of sight;
    that of full attention has a slot for every position.
    """
    if context.cu_seqlens is None:
        return _attend_rows(q, k, v, context.positions, window, state, has_gaps=False)
    rows = DocumentRows(context)
    q, k, v = (rows.unpack(x) for x in (q, k, v))
    return rows.pack(_attend_rows(q, k, v, rows.unpack(context.positions, -1), window, state, has_gaps=True))


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int, state: State, *, has_gaps: bool
) -> Tensor:
    """`cached_attention` of dense rows; with gaps, the leftmost tokens of a row are none (position -1)."""
    new = {"k": k, "v": v, "positions": positions}
    length = q.shape[1]
    ring_is_all = length == 1 or not window  # then what a new token replaces is out of its sight
    if ring_is_all:
        write(state, new, has_gaps)
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        seen = state
        if not ring_is_all:
            near = slice(max(start - window + 1, 0), block.stop)
            seen = {name: torch.cat([state[name], tensor[:, near]], dim=1) for name, tensor in new.items()}
        distance = positions[:, block, None] - seen["positions"][:, None, :]
        mask = (distance >= 0) & (seen["positions"] >= 0)[:, None, :]
        if window:
            mask &= distance < window
        outputs.append(masked_attention(q[:, block], seen["k"], seen["v"], mask))
    if not ring_is_all:
        write(state, new, has_gaps)
    return torch.cat(outputs, dim=1)


def write(state: State, new: State, has_gaps: bool) -> None:
    """Put the last tokens of each row into their slots; a gap's slot keeps what it holds."""
    positions, capacity = new["positions"], state["positions"].shape[1]
    n_columns = min(positions.shape[1], capacity)
    to_end = torch.arange(n_columns - 1, -1, -1, device=positions.device)
    slots = (positions[:, -1:] - to_end) % capacity  # consecutive, gaps included: no slot twice in a row
    is_token = positions[:, -n_columns:] >= 0
    for name, tensor in new.items():
        tensor, trailing = tensor[:, -n_columns:], (1,) * (tensor.dim() - 2)
        index = slots.view(*slots.shape, *trailing).expand_as(tensor)
        if has_gaps:
            tensor = torch.where(is_token.view(*slots.shape, *trailing), tensor, state[name].gather(1, index))
        state[name].scatter_(1, index, tensor)
