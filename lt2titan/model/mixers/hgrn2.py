"""HGRN2: a gated linear RNN with expanded states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2titan.kernels.gla import gla
from lt2titan.model.context import Carry, Context
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import HGRN2Config
from lt2titan.model.mixers.pieces import (
    gla_flops,
    recur,
    recurrent_spec,
    shared_rms_norm,
)
from lt2titan.model.precision import precise
from lt2titan.model.shares import local


class HGRN2(Mixer):
    """S <- Diag(a) S + (1 - a) i^T, read by q; a = sigmoid(W_f x) per channel (arXiv 2404.07904).

    q = silu(W_q x) and i = W_i x; the heads' outputs, scaled by head width^-0.5, are RMS-normed together over dim. As
    in LT2 there is no lower bound on a, no convolution and no output gate.
    """

    def __init__(self, config: HGRN2Config, common: Common) -> None:
        super().__init__()
        dim = common.dim
        self.n_heads, self.head_dim = config.n_heads, dim // config.n_heads
        self.norm_eps, self.backend = common.norm_eps, common.backend
        self.q_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.f_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.i_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.o_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.o_norm = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        f = precise(self.f_proj(x))
        k = torch.sigmoid(-f).to(x.dtype)  # 1 - sigmoid(f) without its cancellation
        y = recur(
            gla,
            F.silu(self.q_proj(x)).unflatten(-1, (-1, self.head_dim)),
            k.unflatten(-1, (-1, self.head_dim)),
            self.i_proj(x).unflatten(-1, (-1, self.head_dim)),
            F.logsigmoid(f).unflatten(-1, (-1, self.head_dim)),
            context=context,
            state=state,
            backend=self.backend,
        )
        y = shared_rms_norm(y.flatten(-2), local(self.o_norm), self.norm_eps, self.share)
        return self.o_proj(y), carry

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        return {"q_proj.weight": 0, "f_proj.weight": 0, "i_proj.weight": 0, "o_norm": 0, "o_proj.weight": 1}

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        return recurrent_spec(batch_size, self.n_heads, self.head_dim, self.head_dim)

    def recurrence_flops(self) -> float:
        return self.n_heads * gla_flops(self.head_dim, self.head_dim)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(1.0)  # o_norm
