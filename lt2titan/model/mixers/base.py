"""The mixer protocol. A new mixer is one file, one row in the registry, one table in the configuration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lt2titan.model.context import Carry, Context
from lt2titan.model.shares import Share

State = dict[str, Tensor]
"""The decode state of one (layer, loop): tensors allocated once and updated in place."""


class StateSpec(NamedTuple):
    """One tensor of a decode state; dtype None is the compute dtype, fill its initial value."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    fill: int = 0


class Common(NamedTuple):
    """What every mixer is built with beside its own sizes."""

    dim: int
    norm_eps: float
    is_first: bool  # of its kind in the physical stack
    backend: str  # of the operators, "reference" or "fla"
    n_alike: int = 1  # layers of its kind in the physical stack


class Mixer(nn.Module):
    """Mixes tokens: y_t depends on x_1..x_t of the same document."""

    rotary_dim: int = 0
    """Head width that needs RoPE tables in the context; 0 for none."""

    key_block_size: int = 0
    """Tokens in the blocks of keys whose layout it needs in the context; 0 for none."""

    @property
    def rotary_dims(self) -> set[int]:
        """All of them."""
        return {self.rotary_dim} - {0}

    auxiliary_losses: tuple[str, ...] = ()
    """Names in the carry of losses that such layers add theirs to: (1,), since torch.compile would take an fp64 scalar
    for a number of Python's; summed over tokens, layers and the loops that have gradients."""

    share = Share()
    """Of the heads, which this rank computes; set by parallel/tensor_parallel.py."""

    def forward(self, x: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        """x (B, L, dim) -> (B, L, dim). With ``state``, x continues the sequences it holds, and it is updated."""
        raise NotImplementedError

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        """Parameters by name that ``n_ranks`` ranks split by heads, and the dimension that they split; all others are
        whole on every rank. The mixer's output is then a summand: ranks split the columns of the output projection."""
        raise NotImplementedError

    def learns_apart(self, name: str) -> bool:
        """Whether an auxiliary loss, and nothing else, trains the parameter ``name``."""
        return False

    def initial_carry(self, x: Tensor, context: Context) -> Carry:
        """What this mixer reads from the carry, for hidden states x, before any layer has written it."""
        return {}

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        """Decode state for ``batch_size`` sequences of up to ``max_length`` tokens; ``window`` as in Context."""
        raise NotImplementedError

    def attention_flops(self, seq_len: int, window: int | None) -> float:
        """Forward FLOPs per token of products between tokens that model FLOPs count (softmax attention)."""
        return 0.0

    def selection_flops(self, seq_len: int, reuses: bool, is_trained: bool, sees_all: bool) -> float:
        """FLOPs per token, forward and backward, of choosing what attention sees, and of learning to, beyond what
        parameters and `attention_flops` count; less than 0 where those count what is not executed.

        Args:
            reuses: the loop takes over an earlier loop's choice (see Context).
            is_trained: the loop has a backward pass.
            sees_all: attention sees everything all the same (see Context).
        """
        return 0.0

    def recurrence_flops(self) -> float:
        """Forward FLOPs per token of a linear recurrence in chunks; reported apart from model FLOPs."""
        return 0.0

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Initialise a parameter that this mixer owns itself (not one of a child module)."""
        raise NotImplementedError(name)
