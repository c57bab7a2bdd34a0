"""Clipping of gradients that lie over devices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lt2titan.model.lt2 import LT2


class GradNorms(NamedTuple):
    """Global L2 norms of the gradients before clipping, as scalars on the device."""

    total: Tensor
    core: Tensor  # the looped blocks and rho
    rest: Tensor  # embedding, final norm and head
    apart: Tensor  # what auxiliary losses train (indexers); no part of the others


def clip_grad_norm(model: LT2, max_norm: float) -> GradNorms:
    """Scale the gradients of all shards to a global L2 norm of at most ``max_norm``; returns the norms before.

    Parameters that learn apart (`Mixer.learns_apart`) are scaled by their own norm, likewise to ``max_norm``: an
    auxiliary loss changes no step of the others.
    """
    apart = {
        f"core.blocks.{i}.mixer.{name}"
        for i, block in enumerate(model.core.blocks)
        for name, _ in block.mixer.named_parameters()
        if block.mixer.learns_apart(name)
    }
    groups: dict[str, list[nn.Parameter]] = {"core": [], "rest": [], "apart": []}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            groups["apart" if name in apart else "core" if name.startswith("core.") else "rest"].append(parameter)
    # Each is combined over the shards by an all-reduce of one number.
    gradients = [[p.grad for p in group if p.grad is not None] for group in groups.values() if group]
    norms = torch.stack([torch.nn.utils.get_total_norm(group, foreach=True) for group in gradients])
    norms = norms.full_tensor() if isinstance(norms, DTensor) else norms
    of_group = {name: torch.zeros_like(norms[0]) for name in groups}
    of_group |= zip((name for name, group in groups.items() if group), norms, strict=True)
    total = torch.linalg.vector_norm(torch.stack([of_group["core"], of_group["rest"]]))
    torch.nn.utils.clip_grads_with_norm_(groups["core"] + groups["rest"], max_norm, total, foreach=True)
    torch.nn.utils.clip_grads_with_norm_(groups["apart"], max_norm, of_group["apart"], foreach=True)
    return GradNorms(total, **of_group)
