"""From hidden states to logits, and from hidden states and targets to the loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""A target that predicts nothing."""

CHUNK = 4096
"""Tokens whose logits exist at a time: 4096 x 128,256 logits are 2.1 GB in fp32."""


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (..., dim), weight (vocab, dim) -> (..., vocab)."""
    return F.linear(hidden, weight)


def loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the valid targets, in fp32 (fp64 stays fp64).

    The logits of all tokens never exist at once: each chunk's are made again in the backward pass.

    Args:
        hidden: (..., dim).
        weight: (vocab, dim).
        targets: (...), int64, IGNORE_INDEX where nothing is predicted.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if hidden.shape[0] <= CHUNK:
        return _chunk_loss(hidden, weight, targets)
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(_chunk_loss, h, weight, t, use_reentrant=False)
    return total


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    scores = logits(hidden, weight)
    precise = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(precise, targets, ignore_index=IGNORE_INDEX, reduction="sum")
