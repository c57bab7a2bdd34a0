"""Gated delta network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lt2titan.kernels.gated_delta_rule import gated_delta_rule
from lt2titan.kernels.gated_rms_norm import gated_rms_norm
from lt2titan.model.context import Carry, Context
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import GDNConfig
from lt2titan.model.mixers.pieces import (
    convolutions,
    convolve,
    delta_rule_flops,
    init_A_log,
    init_convolution,
    init_dt_bias,
    l2_norm,
    rate_log_decay,
    recur,
    recurrent_spec,
    sigmoid_beta,
)
from lt2titan.model.shares import local


class GDN(Mixer):
    """S <- a (I - b k k^T) S + b k v^T, read by q; a and b depend on the token (arXiv 2412.06464).

    q, k, v pass a short causal convolution with SiLU; q and k are L2-normed; the output is RMS-normed per head and
    gated by SiLU. log a = -exp(A_log) softplus(W_a x + dt_bias), b = sigmoid(W_b x), doubled by allow_neg_eigval.
    """

    def __init__(self, config: GDNConfig, common: Common) -> None:
        super().__init__()
        dim = common.dim
        self.n_heads, self.n_v_heads = config.n_heads, config.n_v_heads or config.n_heads
        key_dim, value_dim = round(config.expand_k * dim), round(config.expand_v * dim)
        self.head_k_dim, self.head_v_dim = key_dim // self.n_heads, value_dim // self.n_v_heads
        self.beta_max = 2.0 if config.allow_neg_eigval else 1.0
        self.norm_eps, self.backend = common.norm_eps, common.backend
        self.q_proj = Linear(dim, key_dim, init_std=dim**-0.5)
        self.k_proj = Linear(dim, key_dim, init_std=dim**-0.5)
        self.v_proj = Linear(dim, value_dim, init_std=dim**-0.5)
        self.gate_proj = Linear(dim, value_dim, init_std=dim**-0.5)
        self.a_proj = Linear(dim, self.n_v_heads, init_std=dim**-0.5)
        self.b_proj = Linear(dim, self.n_v_heads, init_std=dim**-0.5)
        self.o_proj = Linear(value_dim, dim, init_std=dim**-0.5)
        self.q_conv = nn.Parameter(torch.empty(key_dim, config.conv_size))
        self.k_conv = nn.Parameter(torch.empty(key_dim, config.conv_size))
        self.v_conv = nn.Parameter(torch.empty(value_dim, config.conv_size))
        self.A_log = nn.Parameter(torch.empty(self.n_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_v_heads))
        self.o_norm = nn.Parameter(torch.empty(self.head_v_dim))

    def forward(self, x: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        projections = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = convolve(self, "qkv", *projections, context=context, state=state)
        y = recur(
            gated_delta_rule,
            l2_norm(q.unflatten(-1, (-1, self.head_k_dim))),
            l2_norm(k.unflatten(-1, (-1, self.head_k_dim))),
            v.unflatten(-1, (-1, self.head_v_dim)),
            rate_log_decay(self.a_proj(x), local(self.A_log), local(self.dt_bias)),
            sigmoid_beta(self.b_proj(x), self.beta_max),
            context=context,
            state=state,
            backend=self.backend,
        )
        gate = self.gate_proj(x).unflatten(-1, (-1, self.head_v_dim))
        y = gated_rms_norm(y, gate, local(self.o_norm), eps=self.norm_eps, activation="silu", backend=self.backend)
        return self.o_proj(y.flatten(-2)), carry

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        rows = [
            "q_proj.weight",
            "k_proj.weight",
            "v_proj.weight",
            "gate_proj.weight",
            "a_proj.weight",
            "b_proj.weight",
            "q_conv",
            "k_conv",
            "v_conv",
            "A_log",
            "dt_bias",
        ]
        return {**dict.fromkeys(rows, 0), "o_proj.weight": 1}

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        taps = convolutions(self, "qkv")
        return recurrent_spec(batch_size, self.n_v_heads, self.head_k_dim, self.head_v_dim, **taps)

    def recurrence_flops(self) -> float:
        return self.n_v_heads * delta_rule_flops(self.head_k_dim, self.head_v_dim)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if name == "o_norm":
            tensor.fill_(1.0)
        elif name == "A_log":
            init_A_log(tensor, 0.0, generator)
        elif name == "dt_bias":
            init_dt_bias(tensor, generator)
        else:
            init_convolution(tensor, tensor.shape[1], generator)
