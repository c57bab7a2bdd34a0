"""Which activations of the looped core are computed again in the backward pass; parallel/activation_checkpoint.py
decides it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint, noop_context_fn

from lt2titan.model.context import Carry, Context

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""`torch.utils.checkpoint`'s context_fn: contexts of the forward pass and of its repetition."""


@dataclass(frozen=True)
class RecomputePlan:
    """Scopes of recomputation in the core; by default there are none, and every activation is kept.

    loops: of each loop only its input is kept.
    blocks: of each block only its input is kept; inside a loop that is recomputed, from then on.
    n_last_kept: the last loops that run, which are left out of both scopes: the backward pass starts with them.
    block_contexts: around each block and its repetition; says which operators' outputs are kept. None: no output is.
        With it the block itself opens the scope, inside of what torch.compile and FSDP make of its call: a compiled
        graph reuses the memory of its intermediate results, so that nobody outside of it can keep them.
    """

    loops: bool = False
    blocks: bool = False
    n_last_kept: int = 0
    block_contexts: Contexts | None = None

    def of_loop(self, loop: int, n_loops: int) -> RecomputePlan:
        """The plan of one loop (from 0) out of ``n_loops`` that run."""
        return self if loop < n_loops - self.n_last_kept else KEEP_ALL


KEEP_ALL = RecomputePlan()


def visit(
    block: Callable[..., tuple[Tensor, Carry]], plan: RecomputePlan, h: Tensor, context: Context, carry: Carry
) -> tuple[Tensor, Carry]:
    """``block(h, context, carry)``, computed again in the backward pass if ``plan`` says so of blocks."""
    if not plan.blocks:
        return block(h, context, carry)
    if plan.block_contexts is not None:
        return block(h, context, carry, recompute=plan.block_contexts)
    return recomputed(block, h, context, carry)


def recomputed(
    function: Callable[[Tensor, Context, Carry], tuple[Tensor, Carry]],
    h: Tensor,
    context: Context,
    carry: Carry,
    contexts: Contexts = noop_context_fn,
) -> tuple[Tensor, Carry]:
    """``function(h, context, carry)``, of which only h (B, L, dim) and the carry are kept for the backward pass.

    The carry's tensors are handed over one by one: inside of a dict, a scope within another would keep them alive when
    the outer one has let go of everything.
    """
    names = list(carry)

    def call(h: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        h, carry = function(h, context, dict(zip(names, values, strict=True)))
        return h, *(carry[name] for name in names)

    # Nothing in a model is random, so there is no generator to set back.
    h, *values = checkpoint(
        call, h, *carry.values(), use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return h, dict(zip(names, values, strict=True))
