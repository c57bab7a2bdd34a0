"""Softmax attention with RoPE, grouped queries and an optional output gate."""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.kernels.attention import attention, masked_attention
from lt2titan.model.context import Carry, Context, apply_rotary
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import FullConfig, WindowConfig


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
        q = apply_rotary(self.q_proj(x).unflatten(-1, (self.n_heads, self.head_dim)), tables)
        k = apply_rotary(self.k_proj(x).unflatten(-1, (self.n_kv_heads, self.head_dim)), tables)
        v = self.v_proj(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        window = self.window if context.window is None else context.window
        if state is None:
            y = attention(
                q,
                k,
                v,
                window=window,
                cu_seqlens=context.cu_seqlens,
                max_seqlen=context.max_seqlen,
                backend=self.backend,
            )
        else:
            y = cached_attention(q, k, v, context.positions, window, state)
        y = y.flatten(-2)
        if self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(y), carry

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


def cached_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int, state: State) -> Tensor:
    """Attention of new tokens (B, L, ...) over those in ``state`` and themselves; then ``state`` holds them too.

    The state is a ring: the token at position p stands in slot p mod capacity, and ``state["positions"]`` says which
    position each slot holds (-1: none). A window's ring is as long as the window, so it forgets what is out of sight.
    """
    if q.shape[1] == 1:  # decoding: the new token replaces one that is out of sight, so the ring is all it sees
        _write(state, k, v, positions)
        keys, values, key_positions = state["k"], state["v"], state["positions"]
    else:
        keys, values = torch.cat([state["k"], k], dim=1), torch.cat([state["v"], v], dim=1)
        key_positions = torch.cat([state["positions"], positions], dim=1)
        _write(state, k, v, positions)
    distance = positions[:, :, None] - key_positions[:, None, :]
    mask = (distance >= 0) & (key_positions >= 0)[:, None, :]
    if window:
        mask &= distance < window
    return masked_attention(q, keys, values, mask)


def _write(state: State, k: Tensor, v: Tensor, positions: Tensor) -> None:
    capacity = state["k"].shape[1]
    k, v, positions = k[:, -capacity:], v[:, -capacity:], positions[:, -capacity:]
    slots = positions % capacity
    index = slots[:, :, None, None].expand_as(k)
    state["k"].scatter_(1, index, k)
    state["v"].scatter_(1, index, v)
    state["positions"].scatter_(1, slots, positions)
