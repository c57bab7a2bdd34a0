"""The loop: one stack of blocks, visited n_loops times with the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lt2titan.kernels.nsa.layout import block_layout
from lt2titan.model.block import Block
from lt2titan.model.config import FULL_WINDOW, ModelConfig
from lt2titan.model.context import Carry, Context, rotary_tables
from lt2titan.model.mixers.base import State
from lt2titan.model.recompute import KEEP_ALL, RecomputePlan, recomputed, visit
from lt2titan.model.shares import Share, local
from lt2titan.model.stretch import find_stretch


class LoopObserver:
    """Is shown what passes through the core, to measure it; must change nothing. Override what is of interest.

    Both are called without gradient mode, on the core's own level: checkpointing, which runs blocks and loops again in
    the backward pass, does not call them again, and compiled blocks do not know of them. Under FSDP the weights of the
    block just visited, and those outside the core, are gathered when they are called, unless blocks are freed after
    each visit (see `fsdp.kept_gathered`). Under sequence parallelism hidden states are those of this rank's tokens;
    norms (mixer_norm, the model's) return all of them.
    """

    def after_block(self, block: Block, x: Tensor, context: Context) -> None:
        """``block`` has been applied to x (B, L, dim)."""

    def after_loop(self, loop: int, before: Tensor, after: Tensor, rho: Tensor | None) -> None:
        """``loop`` (from 0) has turned ``before`` into ``after`` (B, L, dim); rho (dim,) is its residual gate."""


class LoopedCore(nn.Module):
    """h(t) = F_N o ... o F_1 (h(t-1)) + rho_t * h(t-1) for t = 1..T (LT2, arXiv 2605.20670, section 2.1).

    Nothing crosses from one loop to the next but h: every visit of a block starts from an empty mixer state, since
    the final state of a loop has seen the whole sequence and would leak the future into the next.
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.n_loops = config.n_loops
        self.rope_theta = config.rope_theta
        self.windows = [0 if w == FULL_WINDOW else w for w in config.loop.windows]
        kinds = config.layer_mixers
        self.reuse_every = config.mixers.dsa.reuse_every if "dsa" in kinds else 1
        blocks = nn.ModuleList(Block(config, kind, kinds.index(kind) == i, backend) for i, kind in enumerate(kinds))
        self.blocks: list[Block] = blocks  # type: ignore[assignment]  # a ModuleList cannot name what it holds
        self.rho = nn.Parameter(torch.empty(config.n_loops, config.dim)) if config.loop.residual_gate else None
        self.sees_all_tokens = True
        """False under sequence parallelism: the hidden states are some tokens of every row."""
        self.recompute = KEEP_ALL
        """What is kept for the backward pass; set by parallel/activation_checkpoint.py."""
        self.observer: LoopObserver | None = None

    def window(self, loop: int) -> int | None:
        """Attention window of softmax layers in a loop: 0 is full, None is each mixer's own."""
        return self.windows[loop] if self.windows else None

    def reuses_selection(self, loop: int) -> bool:
        """Whether what a loop's layers see was chosen in an earlier loop."""
        return loop % self.reuse_every > 0

    def residual_gate(self, loop: int) -> Tensor | None:
        """rho (dim,) of a loop, None without."""
        return None if self.rho is None else local(self.rho, is_summed=not self.sees_all_tokens)[loop]

    def make_context(
        self,
        positions: Tensor,
        *,
        stretches: Share,
        is_ring: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        max_seqlen: int = 0,
        sees_all: bool = False,
        is_decoding: bool = False,
    ) -> Context:
        """What the blocks of a forward pass share. Packed rows become one, which is what their kernels take.

        Args:
            positions: (B, L) int64, of this rank's tokens in their documents.
            stretches: of every row, which tokens these are.
            is_ring: attention passes keys round among the ranks of ``stretches``.
            cu_seqlens, cu_seqlens_k, chunk_indices, max_seqlen, sees_all: as of LT2.forward.
            is_decoding: earlier keys are in a decode state, which knows where its blocks lie.
        """
        row_length, stretch = positions.shape[1], None
        if stretches.n_ranks > 1:
            stretch = find_stretch(positions, stretches, cu_seqlens, cu_seqlens_k, is_ring)
        if cu_seqlens is not None:
            positions = positions.reshape(1, -1)
        batch, length = positions.shape
        widths = sorted({width for block in self.blocks for width in block.mixer.rotary_dims})
        sizes = [] if is_decoding else sorted({block.mixer.key_block_size for block in self.blocks} - {0})
        length_k = (stretches.rank + 1) * length
        return Context(
            positions,
            {width: rotary_tables(positions, width, self.rope_theta) for width in widths},
            cu_seqlens,
            chunk_indices,
            (max_seqlen or row_length) * stretches.n_ranks,
            stretch=stretch,
            key_blocks={
                size: block_layout(
                    batch, length, size, cu_seqlens, positions.device, length_k=length_k, cu_seqlens_k=cu_seqlens_k
                )
                for size in sizes
            },
            sees_all=sees_all,
        )

    def initial_carry(self, h: Tensor, context: Context) -> Carry:
        """What the first block is given beside h (B, L, dim). Every name is there from the start: one structure, so
        that a compiled block needs one graph."""
        carry: Carry = {}
        for block in self.blocks:
            carry.update(block.mixer.initial_carry(h, context))
        return carry

    def forward(
        self,
        h: Tensor,
        context: Context,
        states: Sequence[Sequence[State]] | None = None,
        n_loops: int = 0,
        n_backward_loops: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """h (B, L, dim) -> (B, L, dim), and the layers' own losses () by name; ``states[loop][layer]`` when decoding.

        Args:
            n_loops: passes over the blocks, which use the first rows of rho; 0 means all that were built.
            n_backward_loops: gradients pass through this many of the last loops; 0 means through all.
        """
        n_loops = n_loops or self.n_loops
        first_backward_loop = n_loops - n_backward_loops if n_backward_loops else 0
        has_grad = torch.is_grad_enabled()
        carry = self.initial_carry(h, context)
        differentiable = {name for name, value in carry.items() if value.requires_grad}
        for loop in range(n_loops):
            if has_grad and first_backward_loop and loop in (0, first_backward_loop):
                # As what loops without gradients are given, and those with: else compiled blocks need graphs for these
                # two alone.
                begins = loop == first_backward_loop
                h = h.detach().requires_grad_(begins)
                carry = {k: v.detach().requires_grad_(begins and k in differentiable) for k, v in carry.items()}
            with torch.set_grad_enabled(has_grad and loop >= first_backward_loop):
                previous = h
                plan = self.recompute.of_loop(loop, n_loops) if torch.is_grad_enabled() else KEEP_ALL
                apply_loop = partial(self._apply_loop, loop, plan, states)
                if plan.loops:
                    h, carry = recomputed(apply_loop, h, context, carry, self._unobserved_again)
                else:
                    h, carry = apply_loop(h, context, carry)
            if self.observer is not None:
                with torch.no_grad():
                    self.observer.after_loop(loop, previous, h, self.residual_gate(loop))
        losses = {name: carry[name].squeeze(0) for block in self.blocks for name in block.mixer.auxiliary_losses}
        return h, losses

    def _apply_loop(
        self,
        loop: int,
        plan: RecomputePlan,
        states: Sequence[Sequence[State]] | None,
        h: Tensor,
        context: Context,
        carry: Carry,
    ) -> tuple[Tensor, Carry]:
        """One pass over the blocks and the residual gate."""
        context = replace(context, window=self.window(loop), reuses_selection=self.reuses_selection(loop))
        previous = h
        for layer, block in enumerate(self.blocks):
            x = h
            if states is None:
                h, carry = visit(block, plan, h, context, carry)
            else:
                h, carry = block(h, context, carry, states[loop][layer])
            if self.observer is not None:
                with torch.no_grad():
                    self.observer.after_block(block, x, context)
        rho = self.residual_gate(loop)
        if rho is not None:
            h = h + rho * previous
        return h, carry

    @contextmanager
    def observed_by(self, observer: LoopObserver | None) -> Iterator[None]:
        """Show forward passes to ``observer``; None for nobody."""
        before, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = before

    def _unobserved_again(self) -> tuple[nullcontext[None], _Unobserved]:
        """Contexts of a checkpoint: a loop is observed when it first runs, and not when it runs again."""
        return nullcontext(), _Unobserved(self)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.zero_()  # rho


class _Unobserved:
    """`observed_by(None)`, but one object can be entered many times: a graph may be walked back more than once."""

    def __init__(self, core: LoopedCore) -> None:
        self._core = core
        self._observers: list[LoopObserver | None] = []

    def __enter__(self) -> None:
        self._observers.append(self._core.observer)
        self._core.observer = None

    def __exit__(self, *_: object) -> None:
        self._core.observer = self._observers.pop()
