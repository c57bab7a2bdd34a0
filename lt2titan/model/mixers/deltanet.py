"""DeltaNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2titan.kernels.gated_delta_rule import gated_delta_rule
from lt2titan.model.context import Carry, Context
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import DeltaNetConfig
from lt2titan.model.mixers.pieces import (
    convolutions,
    convolve,
    delta_rule_flops,
    init_convolution,
    l2_norm,
    recur,
    recurrent_spec,
    sigmoid_beta,
)
from lt2titan.model.shares import local


class DeltaNet(Mixer):
    """S <- (I - b k k^T) S + b k v^T, read by q; b depends on the token (arXiv 2406.06484).

    q, k, v pass a short causal convolution with SiLU; q and k are L2-normed; the output is RMS-normed per head, without
    a gate. b = sigmoid(W_b x), doubled by allow_neg_eigval.
    """

    def __init__(self, config: DeltaNetConfig, common: Common) -> None:
        super().__init__()
        dim = common.dim
        key_dim, value_dim = round(config.expand_k * dim), round(config.expand_v * dim)
        self.n_heads = config.n_heads
        self.head_k_dim, self.head_v_dim = key_dim // self.n_heads, value_dim // self.n_heads
        self.beta_max = 2.0 if config.allow_neg_eigval else 1.0
        self.norm_eps, self.backend = common.norm_eps, common.backend
        self.q_proj = Linear(dim, key_dim, init_std=dim**-0.5)
        self.k_proj = Linear(dim, key_dim, init_std=dim**-0.5)
        self.v_proj = Linear(dim, value_dim, init_std=dim**-0.5)
        self.b_proj = Linear(dim, self.n_heads, init_std=dim**-0.5)
        self.o_proj = Linear(value_dim, dim, init_std=dim**-0.5)
        self.q_conv = nn.Parameter(torch.empty(key_dim, config.conv_size))
        self.k_conv = nn.Parameter(torch.empty(key_dim, config.conv_size))
        self.v_conv = nn.Parameter(torch.empty(value_dim, config.conv_size))
        self.o_norm = nn.Parameter(torch.empty(self.head_v_dim))

    def forward(self, x: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        projections = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = convolve(self, "qkv", *projections, context=context, state=state)
        beta = sigmoid_beta(self.b_proj(x), self.beta_max)
        # The gated operator with a decay of 1: unlike fla's own delta rule it takes fp32, and it is checked already.
        y = recur(
            gated_delta_rule,
            l2_norm(q.unflatten(-1, (-1, self.head_k_dim))),
            l2_norm(k.unflatten(-1, (-1, self.head_k_dim))),
            v.unflatten(-1, (-1, self.head_v_dim)),
            torch.zeros_like(beta),
            beta,
            context=context,
            state=state,
            backend=self.backend,
        )
        y = F.rms_norm(y, (self.head_v_dim,), local(self.o_norm), self.norm_eps)
        return self.o_proj(y.flatten(-2)), carry

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        rows = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "b_proj.weight", "q_conv", "k_conv", "v_conv"]
        return {**dict.fromkeys(rows, 0), "o_proj.weight": 1}

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        taps = convolutions(self, "qkv")
        return recurrent_spec(batch_size, self.n_heads, self.head_k_dim, self.head_v_dim, **taps)

    def recurrence_flops(self) -> float:
        return self.n_heads * delta_rule_flops(self.head_k_dim, self.head_v_dim)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if name == "o_norm":
            tensor.fill_(1.0)
        else:
            init_convolution(tensor, tensor.shape[1], generator)
