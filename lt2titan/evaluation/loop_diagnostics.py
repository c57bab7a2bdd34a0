"""What each loop knows: the loss if the model stopped after it, and where its attention rests."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lt2titan.data.device import model_inputs
from lt2titan.data.loader import Batch
from lt2titan.model.block import Block
from lt2titan.model.block_selection import block_selection_figures
from lt2titan.model.context import Context
from lt2titan.model.head import IGNORE_INDEX, loss_sum
from lt2titan.model.looped_core import LoopObserver
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.dsa import DSA
from lt2titan.model.mixers.full import Full
from lt2titan.model.mixers.nsa import NSA
from lt2titan.model.selection import selection_figures

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
    selection_recall/loop_t, selection_overlap/loop_t: of layers that choose what attention sees (model/selection.py,
    model/block_selection.py), whether or not it sees_all; left out where there is none, and for rows no longer than
    what they may choose.
    """
    sums = torch.zeros(model.config.n_loops, 8, dtype=torch.float64, device=device)
    for batch in batches:
        lens = _LoopLens(model, batch.targets.to(device))
        with model.core.observed_by(lens):
            model(**model_inputs(batch, device), sees_all=sees_all)
        sums += lens.sums
    if dist.is_initialized():
        dist.all_reduce(sums)
    figures = {}
    names = ("exit_loss", "first_token_mass", "selection_recall", "selection_overlap")
    for loop, of_loop in enumerate(sums.tolist(), start=1):
        for name, total, n in zip(names, of_loop[::2], of_loop[1::2], strict=True):
            if n:
                figures[f"{name}/loop_{loop}"] = total / n
    return figures


class _LoopLens(LoopObserver):
    """Reads every loop of one forward pass as if it were the last. ``sums`` (T, 8) fp64: nats, tokens; attention mass,
    its queries (times heads and layers); recall and overlap of selections, each with its queries (times layers)."""

    def __init__(self, model: LT2, targets: Tensor) -> None:
        self.model, self.targets = model, targets
        n_rows, length = targets.shape
        is_valid = targets != IGNORE_INDEX
        self.n_tokens = is_valid.sum().double()
        # Chosen within each row, so that figures do not depend on how rows are dealt out to ranks and batches.
        # Under context parallelism a row is all of its stretches.
        part = model.stretches
        step = -(-length * part.n_ranks // QUERIES_PER_ROW)
        first = min(-part.rank * length % step, length)
        self.queries = torch.arange(first, length, step, device=targets.device)
        self.counted = is_valid[:, self.queries]  # (B, n)
        starts = torch.arange(0, n_rows * length, length, device=targets.device)
        self.packed_queries = (starts[:, None] + self.queries).flatten()
        self.sums = torch.zeros(model.config.n_loops, 8, dtype=torch.float64, device=targets.device)
        self.mass, self.selection = self.sums.new_zeros(2), self.sums.new_zeros(4)
        self.chosen: dict[DSA | NSA, Tensor] = {}

    def after_block(self, block: Block, x: Tensor, context: Context) -> None:
        mixer = block.mixer
        if not isinstance(mixer, (Full, DSA, NSA)):
            return
        x, queries, counted = block.mixer_norm(x), self.queries, self.counted
        if isinstance(mixer, DSA):
            sums, self.chosen[mixer] = selection_figures(mixer, x, context, queries, counted, self.chosen.get(mixer))
            self.selection += sums
            return
        if context.cu_seqlens is not None:  # packed rows come as one
            queries, counted = self.packed_queries, counted.view(1, -1)
        if isinstance(mixer, Full):
            self.mass += mixer.first_token_mass(x, context, queries, counted)
            return
        before = self.chosen.get(mixer)
        sums, self.chosen[mixer] = block_selection_figures(mixer, x, context, queries, counted, before)
        self.selection += sums

    def after_loop(self, loop: int, before: Tensor, after: Tensor, rho: Tensor | None) -> None:
        h = self.model.norm(after)
        nats = loss_sum(h, self.model.head_weight, self.targets.view(h.shape[:2]))  # packed rows come as one
        self.sums[loop] = torch.cat([nats.double()[None], self.n_tokens[None], self.mass, self.selection])
        self.mass, self.selection = torch.zeros_like(self.mass), torch.zeros_like(self.selection)
