"""Clipping of gradients that lie over devices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lt2titan.model.lt2 import LT2


class GradNorms(NamedTuple):
    """Global L2 norms of the gradients before clipping, as scalars on the device."""

    total: Tensor
    core: Tensor  # the looped blocks and rho
    rest: Tensor  # embedding, final norm and head


def clip_grad_norm(model: LT2, max_norm: float) -> GradNorms:
    """Scale the gradients of all shards to a global L2 norm of at most ``max_norm``; returns the norms before."""
    core: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            (core if name.startswith("core.") else rest).append(parameter.grad)
    # Each is combined over the shards by an all-reduce of one number.
    norms = torch.stack([torch.nn.utils.get_total_norm(gradients, foreach=True) for gradients in (core, rest)])
    norms = norms.full_tensor() if isinstance(norms, DTensor) else norms
    total = torch.linalg.vector_norm(norms)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, total, foreach=True)
    return GradNorms(total, *norms)
