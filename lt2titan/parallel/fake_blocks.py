"""Blocks of the core on tensors that have shapes and no memory: what a visit keeps or sends, without running it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lt2titan.model.block import Block
from lt2titan.model.context import Carry, Context
from lt2titan.model.looped_core import LoopedCore
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.dsa import DSA
from lt2titan.model.mixers.full import Full
from lt2titan.model.shares import Share
from lt2titan.parallel.float8 import zeros_as_gathered
from lt2titan.parallel.layout import Layout
from lt2titan.parallel.tensor_parallel import join_shares, split_parameters

CONTEXT, TENSOR = "context", "tensor"
"""Names of groups of ranks, which fake collectives do not look for."""

T = TypeVar("T")


def first_share(model: LT2, layout: Layout) -> LT2:
    """What the first tensor-parallel rank has of ``model``, which is on ``meta``, not sharded, and stays as it is."""
    if layout.n_tensor == 1:
        return model
    splits = split_parameters(model, layout.n_tensor)
    shares = {}
    for name, parameter in model.named_parameters():
        share = parameter
        if (dim := splits.get(name)) is not None:
            share = nn.Parameter(parameter.detach().narrow(dim, 0, parameter.shape[dim] // layout.n_tensor))
        shares[id(parameter)] = share
    copy = deepcopy(model, shares)
    join_shares(copy, Share(0, layout.n_tensor, TENSOR), layout.sequence_parallel)
    return copy


def block_inputs(
    model: LT2,
    *,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    n_documents: int,
    n_context: int,
    n_token_shares: int = 1,
) -> tuple[Tensor, Context, Carry]:
    """Zeros that a block of ``model`` can be called with, in a FakeTensorMode: hidden states, of ``dtype``, of rows
    (batch_size, length), and what comes with them.

    Args:
        n_documents: of rows that are packed documents, entries of cu_seqlens but one; 0 for dense rows.
        n_context: context-parallel ranks, of whose rows these are the last stretches.
        n_token_shares: the hidden states are of 1 / n_token_shares of the tokens, see `Layout`.
    """
    cu_seqlens = torch.zeros(n_documents + 1, dtype=torch.int32) if n_documents else None
    context = model.core.make_context(
        torch.zeros(batch_size, length, dtype=torch.int64),
        stretches=Share(n_context - 1, n_context, CONTEXT),
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens if n_context > 1 else None,
    )
    n_rows, n_tokens = context.positions.shape
    h = torch.zeros(n_rows, n_tokens // n_token_shares, model.config.dim, dtype=dtype, requires_grad=True)
    return h, context, model.core.initial_carry(h, context)


def of_visits(
    core: LoopedCore, h: Tensor, context: Context, carry: Carry, measure: Callable[[Block, Tensor, Context, Carry], T]
) -> list[list[T]]:
    """What ``measure`` finds of each visit, [loop][layer]; of those that are alike it is asked once."""
    known: dict[Any, T] = {}

    def found(layer: int, loop: int) -> T:
        block: Block = core.blocks[layer]
        window, reuses = core.window(loop), core.reuses_selection(loop)
        shapes = tuple((name, p.shape) for name, p in block.named_parameters())
        kinds = tuple(type(module) for module in block.modules())  # a mixer's, and which maps are in float8
        way = window if isinstance(block.mixer, Full) else reuses if isinstance(block.mixer, DSA) else None
        key = (kinds, shapes, way)
        if key not in known:
            fake = deepcopy(block, {id(p): zeros_as_gathered(p, h.dtype) for p in block.parameters()})
            known[key] = measure(fake, h, replace(context, window=window, reuses_selection=reuses), carry)
        return known[key]

    return [[found(layer, loop) for layer in range(len(core.blocks))] for loop in range(core.n_loops)]
