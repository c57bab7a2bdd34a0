"""Parameters and executed FLOPs, counted from the modules of a built model (``meta`` will do)."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lt2titan.model.loop_schedule import LoopSchedule
from lt2titan.model.lt2 import LT2


class ParameterCount(NamedTuple):
    """total = embedding + core + norm + untied head; core counts each block once, whatever the loops, and rho."""

    total: int
    embedding: int
    core: int
    head: int
    blocks: list[int]


class Flops(NamedTuple):
    """Training FLOPs per token, forward and backward.

    model: what MFU counts. recurrence: the linear mixers' products with states and between tokens of a chunk, which
    MFU leaves out (1 to 6 % over the recipes).
    """

    model: float
    recurrence: float


def count_parameters(model: LT2) -> ParameterCount:
    """Parameters of the model; tied weights count once, as embedding."""
    return ParameterCount(
        total=_size(model),
        embedding=_size(model.embedding),
        core=_size(model.core),
        head=0 if model.head is None else _size(model.head),
        blocks=[_size(block) for block in model.core.blocks],
    )


def training_flops_per_token(
    model: LT2, seq_len: int, n_loops: int = 0, n_backward_loops: int = 0, sees_all: bool = False
) -> Flops:
    """FLOPs that one training step executes per token, averaged over a sequence of ``seq_len``.

    6 (2 forward, 4 backward) for each parameter of the blocks in every loop and of the head; for each softmax layer
    executed, both products with the tokens it sees (causal, inside its window of that loop, or chosen) three times
    over, and what choosing them takes. Loops without gradients are their forward alone, a third of that. Left out: the
    embedding's look-up, recomputation, norms and gates outside of matrices, rho.

    Args:
        n_loops: executed loops; 0 means all that were built.
        n_backward_loops: gradients pass through this many of the last; 0 means through all.
        sees_all: as in `LT2.forward`.
    """
    core = model.core
    n_loops = n_loops or core.n_loops
    first_backward_loop = n_loops - (n_backward_loops or n_loops)
    matrices, attention, recurrence = 6.0 * model.head_weight.numel(), 0.0, 0.0
    for loop in range(n_loops):
        n_passes = 3 if loop >= first_backward_loop else 1  # forward, and twice that backward
        for block in core.blocks:
            matrices += n_passes * 2.0 * _size(block)
            attention += n_passes * block.mixer.attention_flops(seq_len, core.window(loop))
            attention += block.mixer.selection_flops(seq_len, core.reuses_selection(loop), n_passes == 3, sees_all)
            recurrence += n_passes * block.mixer.recurrence_flops()
    return Flops(matrices + attention, recurrence)


def scheduled_flops_per_token(model: LT2, seq_len: int, schedule: LoopSchedule, n_steps: int) -> Flops:
    """`training_flops_per_token` of an average step among the first ``n_steps`` of ``schedule``."""
    mean = [0.0, 0.0]
    for n_loops, share in schedule.shares(n_steps).items():
        flops = training_flops_per_token(model, seq_len, n_loops, schedule.backward_loops(n_loops))
        mean = [total + share * part for total, part in zip(mean, flops, strict=True)]
    return Flops(*mean)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
