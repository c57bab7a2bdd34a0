"""Mamba-2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2titan.kernels.simple_gla import simple_gla
from lt2titan.model.context import Carry, Context
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import Mamba2Config
from lt2titan.model.mixers.pieces import (
    convolutions,
    convolve,
    gla_flops,
    init_A_log,
    init_convolution,
    init_dt_bias,
    recur,
    recurrent_spec,
    shared_rms_norm,
)
from lt2titan.model.precision import precise
from lt2titan.model.shares import local


class Mamba2(Mixer):
    """S <- a S + B (dt x)^T, y = S^T C + D x, with dt and so the decay a depending on the token (arXiv 2405.21060).

    x, B and C pass a short causal convolution with SiLU; dt = softplus(W_dt u + dt_bias) and log a = -exp(A_log) dt
    for the layer's input u; the output is gated by SiLU(W_gate u) and then RMS-normed, per group of heads.
    """

    def __init__(self, config: Mamba2Config, common: Common) -> None:
        super().__init__()
        dim = common.dim
        self.n_heads, self.n_groups, self.state_size = config.n_heads, config.n_groups, config.state_size
        inner_dim, group_dim = round(config.expand * dim), self.n_groups * self.state_size
        self.head_dim = inner_dim // self.n_heads
        self.norm_eps, self.backend, self.conv_size = common.norm_eps, common.backend, config.conv_size
        self.x_proj = Linear(dim, inner_dim, init_std=dim**-0.5)
        self.b_proj = Linear(dim, group_dim, init_std=dim**-0.5)
        self.c_proj = Linear(dim, group_dim, init_std=dim**-0.5)
        self.dt_proj = Linear(dim, self.n_heads, init_std=dim**-0.5)
        self.gate_proj = Linear(dim, inner_dim, init_std=dim**-0.5)
        self.o_proj = Linear(inner_dim, dim, init_std=dim**-0.5)
        self.x_conv = nn.Parameter(torch.empty(inner_dim, config.conv_size))
        self.b_conv = nn.Parameter(torch.empty(group_dim, config.conv_size))
        self.c_conv = nn.Parameter(torch.empty(group_dim, config.conv_size))
        self.x_conv_bias = nn.Parameter(torch.empty(inner_dim))
        self.b_conv_bias = nn.Parameter(torch.empty(group_dim))
        self.c_conv_bias = nn.Parameter(torch.empty(group_dim))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.o_norm = nn.Parameter(torch.empty(inner_dim))

    def forward(self, x: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        projections = self.x_proj(x), self.b_proj(x), self.c_proj(x)
        values, b, c = convolve(self, "xbc", *projections, context=context, state=state)
        values, k, q = values.unflatten(-1, (-1, self.head_dim)), self._groups(b), self._groups(c)
        dt = self.dt_proj(x)
        dt = F.softplus(precise(dt) + precise(local(self.dt_bias)))  # (B, L, H)
        y = recur(
            simple_gla,
            q,
            k,
            (values * dt.unsqueeze(-1)).to(values.dtype),
            -precise(local(self.A_log)).exp() * dt,
            scale=1.0,
            context=context,
            state=state,
            backend=self.backend,
        )
        y = y + local(self.D).to(y.dtype).unsqueeze(-1) * values
        y = y.flatten(-2) * F.silu(self.gate_proj(x))
        y = self._norm(y) * local(self.o_norm)
        return self.o_proj(y), carry

    def _groups(self, x: Tensor) -> Tensor:
        """B or C -> (B, L, G, N), of the groups that this rank's heads read."""
        x = x.unflatten(-1, (-1, self.state_size))
        if self._splits_groups(self.share.n_ranks):
            return x  # they came split
        group = self.share.rank * self.n_groups // self.share.n_ranks
        return x[:, :, group : group + 1]

    def _norm(self, y: Tensor) -> Tensor:
        """RMS norm of y (B, L, inner) over each group of heads, which several ranks may share."""
        if self._splits_groups(self.share.n_ranks):
            width = self.n_heads * self.head_dim // self.n_groups
            return F.rms_norm(y.unflatten(-1, (-1, width)), (width,), eps=self.norm_eps).flatten(-2)
        n_sharing = self.share.n_ranks // self.n_groups
        return shared_rms_norm(y, None, self.norm_eps, self.share, n_sharing)

    def _splits_groups(self, n_ranks: int) -> bool:
        """Each rank has groups of its own; else each group has ranks of its own."""
        return self.n_groups % n_ranks == 0

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        rows = ["x_proj.weight", "dt_proj.weight", "gate_proj.weight"]
        rows += ["x_conv", "x_conv_bias", "A_log", "dt_bias", "D", "o_norm"]
        if self._splits_groups(n_ranks):
            rows += ["b_proj.weight", "c_proj.weight", "b_conv", "b_conv_bias", "c_conv", "c_conv_bias"]
        return {**dict.fromkeys(rows, 0), "o_proj.weight": 1}

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        taps = convolutions(self, "xbc")
        return recurrent_spec(batch_size, self.n_heads, self.state_size, self.head_dim, **taps)

    def recurrence_flops(self) -> float:
        return self.n_heads * gla_flops(self.state_size, self.head_dim)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if name in ("D", "o_norm"):
            tensor.fill_(1.0)
        elif name == "A_log":
            init_A_log(tensor, 0.0, generator)
        elif name == "dt_bias":
            init_dt_bias(tensor, generator)
        else:
            init_convolution(tensor, self.conv_size, generator)
