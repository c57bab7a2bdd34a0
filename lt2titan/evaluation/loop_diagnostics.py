"""What each loop knows: the loss if the model stopped after it, and where its attention rests."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lt2titan.data.device import model_inputs
from lt2titan.data.loader import Batch
from lt2titan.model.block import Block
from lt2titan.model.context import Context
from lt2titan.model.head import IGNORE_INDEX, loss_sum
from lt2titan.model.looped_core import LoopObserver
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.full import Full

SLICE_ROWS = 8
"""Rows of the validation text that are enough to look at, over all ranks."""

QUERIES_PER_ROW = 512
"""Queries whose attention is looked at in a row, evenly spaced: the cost grows with the length, not its square."""


@torch.no_grad()
def validation_diagnostics(
    model: LT2, batches: Iterable[Batch], device: torch.device, sees_all: bool = False
) -> dict[str, float]:
    """Figures over the valid targets of ``batches`` on all ranks; each rank must bring as many batches.

    exit_loss/loop_t: nats per token when the final norm and head read h(t) (the logit lens); at t = T the loss itself.
    first_token_mass/loop_t: mean attention probability on the first token of the document, over softmax layers, heads
    and the queries that may see it (see model/attention_mass.py); left out where there is none.
    """
    sums = torch.zeros(model.config.n_loops, 4, dtype=torch.float64, device=device)
    for batch in batches:
        lens = _LoopLens(model, batch.targets.to(device))
        with model.core.observed_by(lens):
            model(**model_inputs(batch, device), sees_all=sees_all)
        sums += lens.sums
    if dist.is_initialized():
        dist.all_reduce(sums)
    figures = {}
    for loop, (nats, n_tokens, mass, n_queries) in enumerate(sums.tolist(), start=1):
        if n_tokens:
            figures[f"exit_loss/loop_{loop}"] = nats / n_tokens
        if n_queries:
            figures[f"first_token_mass/loop_{loop}"] = mass / n_queries
    return figures


class _LoopLens(LoopObserver):
    """Reads every loop of one forward pass as if it were the last. ``sums`` (T, 4) fp64: nats, tokens, attention mass,
    its queries (times heads and layers)."""

    def __init__(self, model: LT2, targets: Tensor) -> None:
        self.model, self.targets = model, targets
        n_rows, length = targets.shape
        is_valid = targets != IGNORE_INDEX
        self.n_tokens = is_valid.sum().double()
        # Chosen within each row, so that figures do not depend on how rows are dealt out to ranks and batches.
        self.queries = torch.arange(0, length, -(-length // QUERIES_PER_ROW), device=targets.device)
        self.counted = is_valid[:, self.queries]  # (B, n)
        starts = torch.arange(0, n_rows * length, length, device=targets.device)
        self.packed_queries = (starts[:, None] + self.queries).flatten()
        self.sums = torch.zeros(model.config.n_loops, 4, dtype=torch.float64, device=targets.device)
        self.mass = self.sums.new_zeros(2)

    def after_block(self, block: Block, x: Tensor, context: Context) -> None:
        if not isinstance(block.mixer, Full):
            return
        x = block.mixer_norm(x)
        if context.cu_seqlens is None:
            self.mass += block.mixer.first_token_mass(x, context, self.queries, self.counted)
        else:  # packed rows come as one
            self.mass += block.mixer.first_token_mass(x, context, self.packed_queries, self.counted.view(1, -1))

    def after_loop(self, loop: int, before: Tensor, after: Tensor, rho: Tensor | None) -> None:
        h = self.model.norm(after)
        nats = loss_sum(h, self.model.head_weight, self.targets.view(h.shape[:2]))  # packed rows come as one
        self.sums[loop] = torch.cat([nats.double()[None], self.n_tokens[None], self.mass])
        self.mass = torch.zeros_like(self.mass)
