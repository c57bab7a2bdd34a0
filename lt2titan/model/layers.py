"""Layers without state of their own: linear maps that know their initialisation, RMSNorm, SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lt2titan.model.parallel_head import embed_share
from lt2titan.model.shares import local


class Linear(nn.Linear):
    """A linear map without bias, initialised by a truncated normal of standard deviation ``init_std``."""

    def __init__(self, in_features: int, out_features: int, init_std: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.init_std = init_std

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight))


class WholeLinear(Linear):
    """A linear map that tensor-parallel ranks all have whole and apply to the same tokens, so that each finds the whole
    gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight, is_summed=False))


class Embedding(nn.Embedding):
    """Rows of a table; where its rows are split over ranks, this rank's share of them, to be summed."""

    def forward(self, tokens: Tensor) -> Tensor:
        if isinstance(self.weight, DTensor):
            return embed_share(tokens, self.weight)
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; torch computes it in fp32 for bf16 inputs."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.sees_all_tokens = True
        """False under sequence parallelism, where every rank norms tokens of its own."""
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        weight = local(self.weight, is_summed=not self.sees_all_tokens)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x) (arXiv 2002.05202)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, width, init_std=dim**-0.5)
        self.up_proj = Linear(dim, width, init_std=dim**-0.5)
        self.down_proj = Linear(width, dim, init_std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
