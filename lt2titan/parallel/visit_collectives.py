"""What ranks send each other in a visit of a block, over tensor and context axes: blocks run on fake tensors, with
fake collectives, forward and backward, and these are counted. So a new mixer needs no formula.

Collectives are counted as rings: of n ranks each sends (n - 1) / n of what is gathered, or reduced and scattered, and
twice that in an all-reduce.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop

from lt2titan.model.block import Block
from lt2titan.model.context import Carry, Context
from lt2titan.model.lt2 import LT2
from lt2titan.model.recompute import KEEP_ALL, RecomputePlan, visit
from lt2titan.parallel.fake_blocks import CONTEXT, TENSOR, block_inputs, of_visits

KINDS = {
    "_c10d_functional::all_gather_into_tensor": "all-gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce-scatter",
    "_c10d_functional::all_reduce": "all-reduce",
}


class Collective(NamedTuple):
    kind: str  # "all-gather", "reduce-scatter" or "all-reduce"
    axis: str  # TENSOR or CONTEXT
    n_bytes: int  # that a rank sends


class Visit(NamedTuple):
    """How often a visit has each `Collective`.

    again: in a backward pass that computes the block again, beside ``backward``. Eager, that ends with the last tensor
        that is needed, and sends nothing after it; compiled blocks run to their end.
    """

    forward: Counter[Collective]
    backward: Counter[Collective]
    again: Counter[Collective]


def ring(n: int) -> float:
    """The part of a tensor that each of ``n`` ranks sends to have it gathered, or reduced and scattered."""
    return (n - 1) / n


def visit_collectives(
    model: LT2,
    plan: RecomputePlan,
    *,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    n_documents: int,
    n_context: int,
    n_tensor: int,
    n_token_shares: int,
    is_compiled: bool,
) -> list[list[Visit]]:
    """Of every visit, [loop][layer], in a microbatch on the last of the context-parallel ranks.

    Args:
        model: a tensor-parallel rank's share (`first_share`).
        plan: says what of blocks is computed again, where they are.
        batch_size, length, dtype, n_documents, n_context, n_token_shares: as in `block_inputs`.
    """
    n_ranks = {TENSOR: n_tensor, CONTEXT: n_context}
    eager = torch.compiler.set_stance("force_eager")
    with FakeTensorMode(), eager, set_checkpoint_early_stop(not is_compiled):
        h, context, carry = block_inputs(
            model,
            batch_size=batch_size,
            length=length,
            dtype=dtype,
            n_documents=n_documents,
            n_context=n_context,
            n_token_shares=n_token_shares,
        )
        return of_visits(model.core, h, context, carry, partial(_visit, plan, n_ranks))


def _visit(
    plan: RecomputePlan, n_ranks: dict[str, int], block: Block, h: Tensor, context: Context, carry: Carry
) -> Visit:
    def run(plan: RecomputePlan) -> tuple[Counter[Collective], Counter[Collective]]:
        """Collectives of the forward pass, and of the backward pass."""
        with _Collectives(n_ranks) as forward:
            y, written = visit(block, plan, h, context, carry)
        with _Collectives(n_ranks) as backward:
            torch.stack([x.sum() for x in (y, *written.values()) if x.requires_grad]).sum().backward()
        return forward.counts, backward.counts

    forward, backward = run(KEEP_ALL)
    _, again = run(replace(plan, blocks=True))
    return Visit(forward, backward, again - backward)


class _Collectives(TorchDispatchMode):
    """Counts them by their group's name, which is that of an axis."""

    def __init__(self, n_ranks: dict[str, int]) -> None:
        super().__init__()
        self._n_ranks = n_ranks
        self.counts: Counter[Collective] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = KINDS.get(func._schema.name) if isinstance(func, torch._ops.OpOverload) else None
        if kind is not None:
            axis = args[-1]
            n = self._n_ranks[axis]
            whole = args[0].nbytes * (n if kind == "all-gather" else 1)
            self.counts[Collective(kind, axis, int(whole * ring(n) * (2 if kind == "all-reduce" else 1)))] += 1
        return func(*args, **(kwargs or {}))
