"""The head when its vocabulary is split over ranks: no rank ever has the logits of all words, except to return them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from lt2titan.model.precision import precise
from lt2titan.model.shares import gather_last, local, maximum, share_of, sum_shares


def vocabulary_rows(tokens: Tensor, weight: DTensor) -> tuple[Tensor, Tensor]:
    """Where tokens (...) stand in this rank's rows of ``weight`` (vocab, dim), 0 where in none; whether they do."""
    part = share_of(weight).of(weight.shape[0])
    inside = (tokens >= part.start) & (tokens < part.stop)
    return torch.where(inside, tokens - part.start, 0), inside


def embed_share(tokens: Tensor, weight: DTensor) -> Tensor:
    """tokens (B, L) -> (B, L, dim), 0 where another rank has the row: to be summed over ranks."""
    rows, inside = vocabulary_rows(tokens, weight)
    return F.embedding(rows, local(weight)) * inside.unsqueeze(-1)


def gathered_logits(hidden: Tensor, weight: DTensor) -> Tensor:
    """hidden (..., dim), equal on all ranks -> (..., vocab)."""
    return gather_last(F.linear(hidden, local(weight)), share_of(weight))


def chunk_loss(hidden: Tensor, weight: DTensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The summed cross-entropy of hidden (N, dim) and targets (N,), equal on all ranks; in fp32, fp64 stays fp64.

    log sum exp of a row is a sum of one number per rank, after their maximum is taken off; a target's logit is on one.
    """
    share = share_of(weight)
    scores = precise(F.linear(hidden, local(weight)))  # (N, vocab / n_ranks)
    greatest = maximum(scores.amax(dim=-1), share)
    rows, inside = vocabulary_rows(targets, weight)
    of_target = scores.gather(-1, rows.unsqueeze(-1)).squeeze(-1).masked_fill(~inside, 0.0)
    exponentials = (scores - greatest.unsqueeze(-1)).exp().sum(dim=-1)
    total, of_target = sum_shares(torch.stack([exponentials, of_target]), share)
    losses = greatest + total.log() - of_target
    return losses.masked_fill(targets == ignore_index, 0.0).sum()
