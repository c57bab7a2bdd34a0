"""Loss and bits per byte on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist

from lt2titan.data.device import model_inputs
from lt2titan.data.loader import Batch
from lt2titan.model.head import IGNORE_INDEX
from lt2titan.model.lt2 import LT2


class Evaluation(NamedTuple):
    """loss: nats per token. bits_per_byte: the same information per byte of text, whatever the tokenizer."""

    loss: float
    bits_per_byte: float
    n_tokens: int


@torch.no_grad()
def evaluate(model: LT2, batches: Iterable[Batch], device: torch.device) -> Evaluation:
    """Mean over every valid target of ``batches`` on all ranks; each rank must bring as many batches.

    Raises:
        ValueError: there is no target at all.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    for batch in batches:
        nats = model(**model_inputs(batch, device))
        n_tokens = (batch.targets != IGNORE_INDEX).sum()
        totals += torch.stack([nats.double(), n_tokens.to(device).double(), batch.n_bytes.to(device).double()])
    if dist.is_initialized():
        dist.all_reduce(totals)
    nats, tokens, n_bytes = totals.tolist()
    if tokens == 0:
        raise ValueError("the held-out text has no token to predict; validate on more text")
    bits_per_byte = nats / math.log(2) / n_bytes if n_bytes else math.nan
    return Evaluation(nats / tokens, bits_per_byte, int(tokens))
