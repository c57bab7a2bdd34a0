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
from lt2titan.model.mixers.pieces import gla_flops
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
        # Decays multiply over thousands of tokens: they are computed in fp32 whatever the compute dtype.
        precise = torch.promote_types(x.dtype, torch.float32)
        a = self.a_up_proj(self.a_down_proj(x)).to(precise) + local(self.a_bias).to(precise)
        log_decay = F.logsigmoid(a) / self.decay_temperature
        y, final_state = gla(
            self.q_proj(x).unflatten(-1, (-1, self.head_k_dim)),
            self.k_proj(x).unflatten(-1, (-1, self.head_k_dim)),
            self.v_proj(x).unflatten(-1, (-1, self.head_v_dim)),
            log_decay.unflatten(-1, (-1, self.head_k_dim)),
            initial_state=None if state is None else state["recurrent"],
            cu_seqlens=context.cu_seqlens,
            chunk_indices=context.chunk_indices,
            return_final_state=state is not None,
            backend=self.backend,
        )
        if state is not None and final_state is not None:
            state["recurrent"].copy_(final_state)
        gate = self.gate_proj(x).unflatten(-1, (-1, self.head_v_dim))
        y = gated_rms_norm(y, gate, local(self.o_norm), eps=self.norm_eps, activation="silu", backend=self.backend)
        return self.o_proj(y.flatten(-2)), carry

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        rows = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "a_up_proj.weight", "a_bias"]
        return {**dict.fromkeys(rows, 0), "o_proj.weight": 1}

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        return {"recurrent": StateSpec((batch_size, self.n_heads, self.head_k_dim, self.head_v_dim), torch.float32)}

    def recurrence_flops(self) -> float:
        return self.n_heads * gla_flops(self.head_k_dim, self.head_v_dim)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(1.0 if name == "o_norm" else 0.0)
