"""Kimi delta attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lt2titan.kernels.gated_rms_norm import gated_rms_norm
from lt2titan.kernels.kda import kda
from lt2titan.model.context import Carry, Context
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import KDAConfig
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
from lt2titan.model.precision import precise
from lt2titan.model.shares import local


class KDA(Mixer):
    """S <- (I - b k k^T) Diag(a) S + b k v^T, read by q; a (per channel) and b depend on the token (arXiv 2510.26692).

    q, k, v pass a short causal convolution with SiLU; q and k are L2-normed; the output is RMS-normed per head and
    gated by sigmoid(W_up W_down x + gate_bias). With f = W_up W_down x + dt_bias, log a = -exp(A_log) softplus(f), or
    lower_bound * sigmoid(exp(A_log) f) with bounded_gate. b = sigmoid(W_b x), doubled by allow_neg_eigval.
    """

    def __init__(self, config: KDAConfig, common: Common) -> None:
        super().__init__()
        dim, value_dim = common.dim, round(config.expand_v * common.dim)
        self.n_heads, self.n_v_heads = config.n_heads, config.n_v_heads or config.n_heads
        self.head_k_dim, self.head_v_dim = dim // self.n_heads, value_dim // self.n_v_heads
        self.beta_max = 2.0 if config.allow_neg_eigval else 1.0
        self.bounded_gate, self.lower_bound = config.bounded_gate, config.lower_bound
        self.norm_eps, self.backend = common.norm_eps, common.backend
        rank, decay_dim = self.head_v_dim, self.n_v_heads * self.head_k_dim
        self.q_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.k_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.v_proj = Linear(dim, value_dim, init_std=dim**-0.5)
        self.a_down_proj = Linear(dim, rank, init_std=dim**-0.5)
        self.a_up_proj = Linear(rank, decay_dim, init_std=rank**-0.5)
        self.b_proj = Linear(dim, self.n_v_heads, init_std=dim**-0.5)
        self.gate_down_proj = Linear(dim, rank, init_std=dim**-0.5)
        self.gate_up_proj = Linear(rank, value_dim, init_std=rank**-0.5)
        self.o_proj = Linear(value_dim, dim, init_std=dim**-0.5)
        self.q_conv = nn.Parameter(torch.empty(dim, config.conv_size))
        self.k_conv = nn.Parameter(torch.empty(dim, config.conv_size))
        self.v_conv = nn.Parameter(torch.empty(value_dim, config.conv_size))
        self.A_log = nn.Parameter(torch.empty(self.n_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(decay_dim))
        self.gate_bias = nn.Parameter(torch.empty(value_dim))
        self.o_norm = nn.Parameter(torch.empty(self.head_v_dim))

    def forward(self, x: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        projections = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = convolve(self, "qkv", *projections, context=context, state=state)
        y = recur(
            kda,
            l2_norm(q.unflatten(-1, (-1, self.head_k_dim))),
            l2_norm(k.unflatten(-1, (-1, self.head_k_dim))),
            v.unflatten(-1, (-1, self.head_v_dim)),
            self._log_decay(x),
            sigmoid_beta(self.b_proj(x), self.beta_max),
            bounded=self.bounded_gate,
            context=context,
            state=state,
            backend=self.backend,
        )
        gate = (self.gate_up_proj(self.gate_down_proj(x)) + local(self.gate_bias)).unflatten(-1, (-1, self.head_v_dim))
        y = gated_rms_norm(y, gate, local(self.o_norm), eps=self.norm_eps, activation="sigmoid", backend=self.backend)
        return self.o_proj(y.flatten(-2)), carry

    def _log_decay(self, x: Tensor) -> Tensor:
        """(B, L, HV, K) in fp32, or fp64."""
        a = self.a_up_proj(self.a_down_proj(x)).unflatten(-1, (-1, self.head_k_dim))
        A_log, dt_bias = local(self.A_log).unsqueeze(-1), local(self.dt_bias).unflatten(0, (-1, self.head_k_dim))
        if not self.bounded_gate:
            return rate_log_decay(a, A_log, dt_bias)
        return self.lower_bound * torch.sigmoid(precise(A_log).exp() * (precise(a) + precise(dt_bias)))

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        rows = [
            "q_proj.weight",
            "k_proj.weight",
            "v_proj.weight",
            "a_up_proj.weight",
            "b_proj.weight",
            "gate_up_proj.weight",
            "q_conv",
            "k_conv",
            "v_conv",
            "A_log",
            "dt_bias",
            "gate_bias",
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
        elif name == "gate_bias":
            tensor.zero_()
        elif name == "A_log" and self.bounded_gate:
            tensor.zero_()  # it scales the argument of a sigmoid: times 16, every gate would start shut and stay so
        elif name == "A_log":
            init_A_log(tensor, 1.0, generator)
        elif name == "dt_bias":
            init_dt_bias(tensor, generator)
        else:
            init_convolution(tensor, tensor.shape[1], generator)
