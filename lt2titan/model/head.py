"""From hidden states to logits, and from hidden states and targets to the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lt2titan.model.parallel_head import chunk_loss, gathered_logits
from lt2titan.model.precision import precise

IGNORE_INDEX = -100
"""A target that predicts nothing."""

CHUNK = 4096
"""Tokens whose logits exist at a time: 4096 x 128,256 logits are 2.1 GB in fp32."""

ChunkLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (N, dim), weight (vocab, dim), targets (N,)) -> the summed cross-entropy."""


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (..., dim), weight (vocab, dim) -> (..., vocab)."""
    if isinstance(weight, DTensor):
        return gathered_logits(hidden, weight)
    return F.linear(hidden, weight)


def chunk_loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The `ChunkLoss`; all its logits exist at once."""
    if isinstance(weight, DTensor):
        return chunk_loss(hidden, weight, targets, IGNORE_INDEX)
    scores = logits(hidden, weight)
    return F.cross_entropy(precise(scores), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor, of_chunk: ChunkLoss = chunk_loss_sum) -> Tensor:
    """Cross-entropy in nats, summed over the valid targets, in fp32 (fp64 stays fp64).

    The logits of all tokens never exist at once: each chunk's are made again in the backward pass.

    Args:
        hidden: (..., dim).
        weight: (vocab, dim).
        targets: (...), int64, IGNORE_INDEX where nothing is predicted.
        of_chunk: `chunk_loss_sum`, or what it was compiled to.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if hidden.shape[0] <= CHUNK:
        return of_chunk(hidden, weight, targets)
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(of_chunk, h, weight, t, use_reentrant=False)
    return total
