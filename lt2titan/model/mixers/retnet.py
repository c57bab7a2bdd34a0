"""Retention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lt2titan.kernels.gated_rms_norm import gated_rms_norm
from lt2titan.kernels.simple_gla import simple_gla
from lt2titan.model.context import Carry, Context, apply_rotary
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import RetNetConfig
from lt2titan.model.mixers.pieces import gla_flops, recur, recurrent_spec
from lt2titan.model.shares import local


class RetNet(Mixer):
    """S <- gamma_h S + k v^T, read by q / sqrt(K), with a constant gamma_h = 1 - 2^(-5-h) per head (arXiv 2307.08621).

    q and k turn with their positions (RoPE, for the paper's xPos); the output is RMS-normed per head and gated by SiLU.
    """

    def __init__(self, config: RetNetConfig, common: Common) -> None:
        super().__init__()
        dim = common.dim
        self.n_heads = config.n_heads
        key_dim, value_dim = round(config.expand_k * dim), round(config.expand_v * dim)
        self.head_k_dim, self.head_v_dim = key_dim // self.n_heads, value_dim // self.n_heads
        self.rotary_dim = self.head_k_dim
        self.norm_eps, self.backend = common.norm_eps, common.backend
        self.q_proj = Linear(dim, key_dim, init_std=dim**-0.5)
        self.k_proj = Linear(dim, key_dim, init_std=dim**-0.5)
        self.v_proj = Linear(dim, value_dim, init_std=dim**-0.5)
        self.gate_proj = Linear(dim, value_dim, init_std=dim**-0.5)
        self.o_proj = Linear(value_dim, dim, init_std=dim**-0.5)
        self.o_norm = nn.Parameter(torch.empty(self.head_v_dim))

    def forward(self, x: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        tables = context.rotary[self.head_k_dim]
        q = apply_rotary(self.q_proj(x).unflatten(-1, (-1, self.head_k_dim)), tables)
        k = apply_rotary(self.k_proj(x).unflatten(-1, (-1, self.head_k_dim)), tables)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_v_dim))
        log_decay = log_decays(self.n_heads, x.device)[self.share.of(self.n_heads)]
        log_decay = log_decay.to(torch.promote_types(x.dtype, torch.float32))
        y = recur(
            simple_gla,
            q,
            k,
            v,
            log_decay.expand(v.shape[:3]),
            context=context,
            state=state,
            backend=self.backend,
        )
        gate = self.gate_proj(x).unflatten(-1, (-1, self.head_v_dim))
        y = gated_rms_norm(y, gate, local(self.o_norm), eps=self.norm_eps, activation="silu", backend=self.backend)
        return self.o_proj(y.flatten(-2)), carry

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        return {"q_proj.weight": 0, "k_proj.weight": 0, "v_proj.weight": 0, "gate_proj.weight": 0, "o_proj.weight": 1}

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        return recurrent_spec(batch_size, self.n_heads, self.head_k_dim, self.head_v_dim)

    def recurrence_flops(self) -> float:
        return self.n_heads * gla_flops(self.head_k_dim, self.head_v_dim)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(1.0)  # o_norm


def log_decays(n_heads: int, device: torch.device) -> Tensor:
    """(H,) fp64: log(1 - 2^(-5-h)) of every head h of the layer.

    Computed where it is used rather than kept as a buffer, which would hold no value after `to_empty`. The index is
    the head's place in the whole layer: a part of the heads takes its part of this tensor.
    """
    heads = torch.arange(n_heads, dtype=torch.float64, device=device)
    return torch.log1p(-torch.exp2(-5 - heads))  # log1p: the last heads' decays round to 1 in bf16
