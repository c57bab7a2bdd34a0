"""Loss and bits per byte on held-out text."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lt2titan.data.device import model_inputs
from lt2titan.data.loader import Batch
from lt2titan.model.head import IGNORE_INDEX, loss_sum
from lt2titan.model.looped_core import LoopObserver
from lt2titan.model.lt2 import LT2


class Evaluation(NamedTuple):
    """loss: nats per token. bits_per_byte: the same information per byte of text, whatever the tokenizer."""

    loss: float
    bits_per_byte: float
    n_tokens: int
    loss_at: dict[int, float]
    """Number of loops -> loss of the model that runs so many, for those that were asked for."""


@torch.no_grad()
def evaluate(
    model: LT2,
    batches: Iterable[Batch],
    device: torch.device,
    loops: Collection[int] = (),
    group: dist.ProcessGroup | None = None,
    sees_all: bool = False,
) -> Evaluation:
    """Mean over every valid target of ``batches`` on all ranks; each rank must bring as many batches.

    Args:
        loops: numbers of loops whose losses are wanted too.
        group: ranks that see different tokens; None for all processes.
        sees_all: as in `LT2.forward`.

    Raises:
        ValueError: there is no target at all, or a number of loops that the model does not have.
    """
    n_loops = model.config.n_loops
    if not all(1 <= n <= n_loops for n in loops):
        raise ValueError(f"losses after {sorted(loops)} loops of a model of {n_loops}: choose 1 to {n_loops}")
    totals = torch.zeros(3 + n_loops, dtype=torch.float64, device=device)  # nats, tokens, bytes; nats after each loop
    for batch in batches:
        exits = _Exits(model, batch.targets.to(device), {n for n in loops if n < n_loops})
        with model.core.observed_by(exits if exits.loops else None):
            nats = model(**model_inputs(batch, device), sees_all=sees_all)
        n_tokens = (batch.targets != IGNORE_INDEX).sum()
        totals[:3] += torch.stack([nats.double(), n_tokens.to(device).double(), batch.n_bytes.to(device).double()])
        totals[3:] += exits.nats
    if dist.is_initialized():
        dist.all_reduce(totals, group=group)
    nats, tokens, n_bytes, *nats_after = totals.tolist()
    nats_after[-1] = nats
    if tokens == 0:
        raise ValueError("the held-out text has no token to predict; validate on more text")
    bits_per_byte = nats / math.log(2) / n_bytes if n_bytes else math.nan
    loss_at = {n: nats_after[n - 1] / tokens for n in sorted(loops)}
    return Evaluation(nats / tokens, bits_per_byte, int(tokens), loss_at)


class _Exits(LoopObserver):
    """Sums the cross-entropy after some loops of one forward pass; ``nats`` (T,) fp64, 0 for the others.

    A model that runs fewer loops does what the first loops of one that runs more do, so that one pass serves all.
    """

    def __init__(self, model: LT2, targets: Tensor, loops: set[int]) -> None:
        self.model, self.targets, self.loops = model, targets, loops
        self.nats = torch.zeros(model.config.n_loops, dtype=torch.float64, device=targets.device)

    def after_loop(self, loop: int, before: Tensor, after: Tensor, rho: Tensor | None) -> None:
        if loop + 1 in self.loops:
            h = self.model.norm(after)
            targets = self.targets.view(h.shape[:2])  # packed rows come as one
            self.nats[loop] = loss_sum(h, self.model.head_weight, targets, self.model.chunk_loss).double()
