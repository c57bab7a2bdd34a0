"""Bytes of activations that the looped core holds on one rank, by checkpointing mode, without running it.

Every distinct block is run once on fake tensors (shapes without memory) and what autograd and mode selective would
keep of it is counted; the modes are sums of these counts over layers and loops. So a new mixer needs no formula.

Compiled blocks keep less than eager ones: torch.compile computes cheap operators again by itself. They are divided into
forward and backward passes as for a GPU (parallel/compiled_memory.py), and counted in the same way.

Maps in float8 (parallel/float8.py) keep their input as it is when eager, as any others; compiled, mostly its cast, of
one byte per number. Weights are in the form that FSDP2 gathers; what a visit makes of them and keeps counts.

Counted: tensors saved for the backward pass, each storage once, with the inputs of the blocks and the tensors that all
blocks share (positions, rotary tables, layouts of key blocks). Not counted: weights, what stands outside the core
(embedding, final norm, logits), gradients, workspaces and temporaries inside operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lt2titan.model.block import Block
from lt2titan.model.context import Carry, Context
from lt2titan.model.lt2 import LT2
from lt2titan.model.recompute import RecomputePlan
from lt2titan.parallel.activation_checkpoint import SELECTIVE, is_kept
from lt2titan.parallel.compiled_memory import saved_by_compiled
from lt2titan.parallel.fake_blocks import block_inputs, of_visits


class ActivationMemory(NamedTuple):
    """Bytes of one microbatch on one rank.

    kept: at the end of the forward pass.
    peak: the most that is held in the backward pass, what is computed again included.
    later: the same without the last loop's backward pass, when gradients of all weights stand beside it.
    """

    kept: int
    peak: int
    later: int


class BlockMemory(NamedTuple):
    """Bytes of one visit of a block, beside its input and what is shared."""

    saved: int  # by autograd, if the whole block is kept
    selected: int  # kept by mode selective
    both: int  # in both of these
    carry: int  # written into the carry
    carry_selected: int  # of which mode selective keeps as well


@dataclass(frozen=True)
class CoreMemory:
    """What the modes are sums of.

    input: bytes of the hidden states (B, L, dim), or of a rank's part of their tokens.
    carry: bytes of the initial carry.
    shared: bytes of positions, rotary tables and layouts of key blocks, of which there is one copy.
    blocks: ``blocks[loop][layer]``.
    """

    input: int
    carry: int
    shared: int
    blocks: list[list[BlockMemory]]

    def under(self, plan: RecomputePlan, n_loops: int = 0, n_backward_loops: int = 0) -> ActivationMemory:
        """Under ``plan``, of a pass through the first ``n_loops`` loops (0: all) with gradients through the last
        ``n_backward_loops`` of them (0: all)."""
        n_loops = n_loops or len(self.blocks)
        loops = range(n_loops - (n_backward_loops or n_loops), n_loops)
        recomputed = [loop for loop in loops if plan.of_loop(loop, n_loops) is plan and (plan.loops or plan.blocks)]
        held = self.shared
        if recomputed:
            held += self.carry  # enters the first of them, and is one more than they write
            if plan.loops or not plan.block_contexts or not self.blocks[recomputed[-1]][-1].carry_selected:
                held -= self._last_carry(plan, recomputed[-1])
        peaks = [held]  # without any loop, then when each loop's backward pass begins
        for loop in loops:
            held += self._held(plan, loop) if loop in recomputed else self._whole(loop)
            peaks.append(held + (self._again(plan, loop) if loop in recomputed else 0))
        return ActivationMemory(kept=held, peak=max(peaks), later=max(peaks[:-1]))

    def _whole(self, loop: int) -> int:
        return sum(self.input + block.saved for block in self.blocks[loop])

    def _held(self, plan: RecomputePlan, loop: int) -> int:
        """What a loop that is recomputed leaves behind; its carry goes to the next loop."""
        blocks = self.blocks[loop]
        written = sum(block.carry for block in blocks)
        if plan.loops:
            return self.input + written
        if plan.block_contexts is None:
            return len(blocks) * self.input + written
        return sum(self.input + block.selected + block.carry - block.carry_selected for block in blocks)

    def _last_carry(self, plan: RecomputePlan, loop: int) -> int:
        """Written in the last recomputed loop, and kept by no later scope."""
        blocks = self.blocks[loop]
        return sum(block.carry for block in (blocks if plan.loops else blocks[-1:]))

    def _again(self, plan: RecomputePlan, loop: int) -> int:
        """What is computed again at once, beside what was kept."""
        blocks = self.blocks[loop]
        if not plan.loops:
            return max(block.saved - (block.both if plan.block_contexts else 0) for block in blocks)
        if not plan.blocks:
            return self._whole(loop) - self.input
        inputs = (len(blocks) - 1) * self.input + sum(block.carry for block in blocks[:-1])
        return inputs + max(block.saved for block in blocks)


def core_memory(
    model: LT2,
    *,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    n_documents: int = 0,
    n_context: int = 1,
    n_token_shares: int = 1,
    is_compiled: bool = False,
    memory_budget: float = 1.0,
) -> CoreMemory:
    """Measure the blocks of ``model``, a tensor-parallel rank's share (`first_share`) and on ``meta`` as it may be, for
    rows (batch_size, length) that are computed in ``dtype``. If maps are to be in float8, they have to be so already.

    Args:
        n_documents, n_context, n_token_shares: as in `block_inputs`.
        is_compiled: blocks are compiled, within ``memory_budget``.
    """
    with FakeTensorMode(), nullcontext() if is_compiled else torch.compiler.set_stance("force_eager"):
        h, context, carry = block_inputs(
            model,
            batch_size=batch_size,
            length=length,
            dtype=dtype,
            n_documents=n_documents,
            n_context=n_context,
            n_token_shares=n_token_shares,
        )
        measure = partial(_compiled_block_memory, memory_budget) if is_compiled else _block_memory
        blocks = of_visits(model.core, h, context, carry, measure)
        return CoreMemory(_bytes([h]), _bytes(carry.values()), _bytes(tree_leaves(_shared(context))), blocks)


def _block_memory(block: Block, h: Tensor, context: Context, carry: Carry) -> BlockMemory:
    saved: list[Tensor] = []
    selected = _Kept()

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    like_gpu = nullcontext() if block.mixer.backend == "reference" else _FusedNorms()
    with saved_tensors_hooks(keep, lambda t: t), selected, like_gpu:
        y, written = block(h, context, carry)
    given = _storages([h, y, *carry.values(), *tree_leaves(_shared(context)), *block.parameters()])
    of_autograd = {key: n for key, n in _storages(saved).items() if key not in given}
    of_policy = {key: n for key, n in _storages(selected.tensors).items() if key not in given}
    of_carry = {key: n for key, n in _storages(written.values()).items() if key not in given}
    return BlockMemory(
        saved=sum(of_autograd.values()),
        selected=sum(of_policy.values()),
        both=sum(n for key, n in of_policy.items() if key in of_autograd),
        carry=sum(of_carry.values()),
        carry_selected=sum(n for key, n in of_carry.items() if key in of_policy),
    )


def _compiled_block_memory(
    memory_budget: float, block: Block, h: Tensor, context: Context, carry: Carry
) -> BlockMemory:
    """What mode selective computes again within a graph counts as the difference to what is saved without it."""
    eager = _block_memory(block, h, context, carry)
    given = _storages([h, *carry.values(), *tree_leaves(_shared(context)), *block.parameters()])

    def n_saved(**options: Any) -> int:
        saved = saved_by_compiled(block, h, context, carry, **options)
        return sum(n for key, n in _storages(saved).items() if key not in given)

    saved, selected = n_saved(memory_budget=memory_budget), n_saved(recompute=SELECTIVE)
    return eager._replace(saved=saved, selected=selected, both=min(saved, selected))


class _FusedNorms(TorchFunctionMode):
    """RMSNorm as it is on a GPU. Fake tensors are the CPU's, where it is several operators, which save fp32 copies."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.rms_norm:
            return _fused_rms_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _FusedRMSNorm.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


class _FusedRMSNorm(torch.autograd.Function):
    """Saves the input, the weight, and one fp32 number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)


class _Kept(TorchDispatchMode):
    """Collects the outputs that mode selective keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_kept(func):
            self.tensors += [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        return out


def _shared(context: Context) -> list[Any]:
    stretch = context.stretch
    of_stretch = [stretch.first, stretch.last, stretch.n_before, stretch.cu_seqlens_k] if stretch else []
    of_tokens = [context.positions, context.rotary, context.cu_seqlens, context.chunk_indices]
    return [of_tokens, of_stretch, context.key_blocks]


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of each storage under ``tensors``, which must be alive."""
    plain = (part for t in tensors if isinstance(t, Tensor) for part in _parts(t))
    storages = (t.untyped_storage() for t in plain)
    return {storage._cdata: storage.nbytes() for storage in storages}


def _parts(tensor: Tensor) -> list[Tensor]:
    """Itself, or what a wrapper such as float8's consists of: numbers and their scale."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(_storages(tensors).values())
