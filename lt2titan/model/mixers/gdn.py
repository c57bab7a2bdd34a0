"""Gated delta network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2titan.kernels.gated_delta_rule import gated_delta_rule
from lt2titan.kernels.gated_rms_norm import gated_rms_norm
from lt2titan.kernels.short_convolution import short_convolution
from lt2titan.model.context import Carry, Context
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import GDNConfig

CHUNK = 64
"""Tokens per chunk that FLOPs are counted for."""


class GDN(Mixer):
    """S <- a (I - b k k^T) S + b k v^T, read by q; a and b depend on the token (arXiv 2412.06464).

    q, k, v pass a short causal convolution with SiLU; q and k are L2-normed; the output is RMS-normed per head and
    gated by SiLU. log a = -exp(A_log) softplus(W_a x + dt_bias), b = sigmoid(W_b x), doubled by allow_neg_eigval.
    """

    def __init__(self, config: GDNConfig, common: Common) -> None:
        super().__init__()
        dim = common.dim
        self.n_heads, self.n_v_heads = config.n_heads, config.n_v_heads or config.n_heads
        key_dim, value_dim = int(config.expand_k * dim), int(config.expand_v * dim)
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
        q = self._convolve("q", self.q_proj(x), context, state).unflatten(-1, (self.n_heads, -1))
        k = self._convolve("k", self.k_proj(x), context, state).unflatten(-1, (self.n_heads, -1))
        v = self._convolve("v", self.v_proj(x), context, state).unflatten(-1, (self.n_v_heads, -1))
        # Decays multiply over thousands of tokens: they are computed in fp32 whatever the compute dtype.
        a, b = self.a_proj(x), self.b_proj(x)
        precise = torch.promote_types(x.dtype, torch.float32)
        log_decay = -self.A_log.to(precise).exp() * F.softplus(a.to(precise) + self.dt_bias.to(precise))
        beta = self.beta_max * torch.sigmoid(b.to(precise))
        y, final_state = gated_delta_rule(
            _l2_norm(q),
            _l2_norm(k),
            v,
            log_decay,
            beta,
            initial_state=None if state is None else state["recurrent"],
            cu_seqlens=context.cu_seqlens,
            chunk_indices=context.chunk_indices,
            return_final_state=state is not None,
            backend=self.backend,
        )
        if state is not None and final_state is not None:
            state["recurrent"].copy_(final_state)
        gate = self.gate_proj(x).unflatten(-1, (self.n_v_heads, -1))
        y = gated_rms_norm(y, gate, self.o_norm, eps=self.norm_eps, activation="silu", backend=self.backend)
        return self.o_proj(y.flatten(-2)), carry

    def _convolve(self, name: str, x: Tensor, context: Context, state: State | None) -> Tensor:
        taps = None if state is None else state[f"{name}_conv"]
        y, final_taps = short_convolution(
            x,
            getattr(self, f"{name}_conv"),
            initial_state=taps,
            cu_seqlens=context.cu_seqlens,
            chunk_indices=context.chunk_indices,
            activation="silu",
            return_final_state=state is not None,
            backend=self.backend,
        )
        if taps is not None and final_taps is not None:
            taps.copy_(final_taps)
        return y

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        recurrent = (batch_size, self.n_v_heads, self.head_k_dim, self.head_v_dim)
        spec = {"recurrent": StateSpec(recurrent, torch.float32)}
        for name in ("q", "k", "v"):
            channels, n_taps = getattr(self, f"{name}_conv").shape
            spec[f"{name}_conv"] = StateSpec((batch_size, channels, n_taps - 1))
        return spec

    def recurrence_flops(self) -> float:
        """Per head and token of a chunk of C: q k^T, k k^T, and the inverse's products with k (2CK each) and v (2CV),
        the scores' product with v (2CV), and three products with the state (2KV each)."""
        k, v = self.head_k_dim, self.head_v_dim
        return self.n_v_heads * (6 * CHUNK * k + 4 * CHUNK * v + 6 * k * v)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if name == "o_norm":
            tensor.fill_(1.0)
        elif name == "A_log":
            tensor.uniform_(0.0, 16.0, generator=generator).clamp_(min=1e-6).log_()
        elif name == "dt_bias":
            low, high = math.log(1e-3), math.log(1e-1)
            dt = tensor.uniform_(low, high, generator=generator).exp_().clamp_(min=1e-4)
            dt.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        else:  # convolutions start as torch's Conv1d does
            bound = tensor.shape[1] ** -0.5
            tensor.uniform_(-bound, bound, generator=generator)


def _l2_norm(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, 1e-6 under the root keeping a zero vector zero.

    Written as an RMS norm, which torch has as one kernel that computes in fp32 and keeps no fp32 copy of x.
    """
    width = x.shape[-1]
    return F.rms_norm(x, (width,), eps=1e-6 / width) * width**-0.5
