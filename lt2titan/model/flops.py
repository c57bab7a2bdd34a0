"""Parameters and executed FLOPs, counted from the modules of a built model (``meta`` will do)."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

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
    MFU leaves out (about 2 % at the reference sizes).
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


def training_flops_per_token(model: LT2, seq_len: int) -> Flops:
    """FLOPs that one training step executes per token, averaged over a sequence of ``seq_len``.

    6 (2 forward, 4 backward) for each parameter of the blocks in every loop and of the head; for each softmax layer
    executed, both products with the tokens it sees (causal, inside its window of that loop) three times over. Left
    out: the embedding's look-up, recomputation, norms and gates outside of matrices, rho.
    """
    core, head = model.core, model.head_weight.numel()
    matrices = 6.0 * (core.n_loops * sum(_size(block) for block in core.blocks) + head)
    attention = recurrence = 0.0
    for loop in range(core.n_loops):
        for block in core.blocks:
            attention += 3 * block.mixer.attention_flops(seq_len, core.window(loop))
            recurrence += 3 * block.mixer.recurrence_flops()
    return Flops(matrices + attention, recurrence)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
