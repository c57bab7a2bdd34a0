"""Gated linear attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2titan.kernels.gated_rms_norm import gated_rms_norm
from lt2titan.kernels.gla import gla
from lt2titan.model.context import Carry, Context
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import GLAConfig
from lt2titan.model.mixers.pieces import gla_flops, recur, recurrent_spec
from lt2titan.model.precision import precise
from lt2titan.model.shares import local


class GLA(Mixer):
    """S <- Diag(a) S + k v^T, read by q; a in (0, 1) per key channel depends on the token (arXiv 2312.06635).

    log a = logsigmoid(W_up W_down x + a_bias) / decay_temperature; the output is RMS-normed per head and gated by SiLU.
    """

    def __init__(self, config: GLAConfig, common: Common) -> None:
        super().__init__()
        dim, rank = common.dim, config.decay_rank
        key_dim, value_dim = round(config.expand_k * dim), round(config.expand_v * dim)
        self.n_heads, self.decay_temperature = config.n_heads, config.decay_temperature
        self.head_k_dim, self.head_v_dim = key_dim // self.n_heads, value_dim // self.n_heads
        self.norm_eps, self.backend = common.norm_eps, common.backend
        self.q_proj = Linear(dim, key_dim, init_std=dim**-0.5)
        self.k_proj = Linear(dim, key_dim, init_std=dim**-0.5)
        self.v_proj = Linear(dim, value_dim, init_std=dim**-0.5)
        self.gate_proj = Linear(dim, value_dim, init_std=dim**-0.5)
        self.a_down_proj = Linear(dim, rank, init_std=dim**-0.5)
        self.a_up_proj = Linear(rank, key_dim, init_std=rank**-0.5)
        self.o_proj = Linear(value_dim, dim, init_std=dim**-0.5)
        self.a_bias = nn.Parameter(torch.empty(key_dim))
        self.o_norm = nn.Parameter(torch.empty(self.head_v_dim))

    def forward(self, x: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        a = precise(self.a_up_proj(self.a_down_proj(x))) + precise(local(self.a_bias))
        log_decay = F.logsigmoid(a) / self.decay_temperature
        y = recur(
            gla,
            self.q_proj(x).unflatten(-1, (-1, self.head_k_dim)),
            self.k_proj(x).unflatten(-1, (-1, self.head_k_dim)),
            self.v_proj(x).unflatten(-1, (-1, self.head_v_dim)),
            log_decay.unflatten(-1, (-1, self.head_k_dim)),
            context=context,
            state=state,
            backend=self.backend,
        )
        gate = self.gate_proj(x).unflatten(-1, (-1, self.head_v_dim))
        y = gated_rms_norm(y, gate, local(self.o_norm), eps=self.norm_eps, activation="silu", backend=self.backend)
        return self.o_proj(y.flatten(-2)), carry

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        rows = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "a_up_proj.weight", "a_bias"]
        return {**dict.fromkeys(rows, 0), "o_proj.weight": 1}

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        return recurrent_spec(batch_size, self.n_heads, self.head_k_dim, self.head_v_dim)

    def recurrence_flops(self) -> float:
        return self.n_heads * gla_flops(self.head_k_dim, self.head_v_dim)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(1.0 if name == "o_norm" else 0.0)
