"""The loop: one stack of blocks, visited n_loops times with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lt2titan.model.block import Block
from lt2titan.model.config import FULL_WINDOW, ModelConfig
from lt2titan.model.context import Carry, Context
from lt2titan.model.mixers.base import State


class LoopedCore(nn.Module):
    """h(t) = F_N o ... o F_1 (h(t-1)) + rho_t * h(t-1) for t = 1..T (LT2, arXiv 2605.20670, section 2.1).

    Nothing crosses from one loop to the next but h: every visit of a block starts from an empty mixer state, since
    the final state of a loop has seen the whole sequence and would leak the future into the next.
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.n_loops = config.n_loops
        self.windows = [0 if w == FULL_WINDOW else w for w in config.loop.windows]
        kinds = config.layer_mixers
        blocks = nn.ModuleList(Block(config, kind, kinds.index(kind) == i, backend) for i, kind in enumerate(kinds))
        self.blocks: list[Block] = blocks  # type: ignore[assignment]  # a ModuleList cannot name what it holds
        self.rho = nn.Parameter(torch.empty(config.n_loops, config.dim)) if config.loop.residual_gate else None
        self.recompute_blocks = False
        """Keep only each block's input for the backward pass; set by parallel/activation_checkpoint.py."""

    def window(self, loop: int) -> int | None:
        """Attention window of softmax layers in a loop: 0 is full, None is each mixer's own."""
        return self.windows[loop] if self.windows else None

    def forward(self, h: Tensor, context: Context, states: Sequence[Sequence[State]] | None = None) -> Tensor:
        """h (B, L, dim) -> (B, L, dim); ``states[loop][layer]`` when decoding."""
        # Every name is there from the start: one structure, so that a compiled block needs one graph.
        carry: Carry = {}
        for block in self.blocks:
            carry.update(block.mixer.initial_carry(h))
        for loop in range(self.n_loops):
            loop_context = replace(context, window=self.window(loop))
            previous = h
            for layer, block in enumerate(self.blocks):
                if self.recompute_blocks and torch.is_grad_enabled():
                    h, carry = checkpoint(block, h, loop_context, carry, use_reentrant=False)
                else:
                    h, carry = block(h, loop_context, carry, None if states is None else states[loop][layer])
            if self.rho is not None:
                h = h + self.rho[loop] * previous
        return h

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.zero_()  # rho
