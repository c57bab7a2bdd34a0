"""The decode state: what a model remembers of the sequences it is generating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lt2titan.model.mixers.base import State

if TYPE_CHECKING:
    from lt2titan.model.lt2 import LT2


class DecodeState:
    """One slot per (loop, layer), allocated once for a batch and a maximal length, updated in place.

    A looped model visits a layer once per loop with other inputs, so every visit has keys, recurrent state and
    convolution taps of its own: without that, generation does not match the full forward pass.
    """

    def __init__(self, slots: Sequence[Sequence[State]], batch_size: int, max_length: int) -> None:
        self.slots = slots
        self.batch_size, self.max_length = batch_size, max_length
        self.length = 0
        """Tokens that every sequence holds."""

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for loop in self.slots for slot in loop for t in slot.values())

    def advance(self, n_tokens: int) -> int:
        """Make room for n_tokens more and return how many there were before.

        Raises:
            ValueError: the state was allocated for fewer tokens.
        """
        start = self.length
        if start + n_tokens > self.max_length:
            raise ValueError(
                f"the decode state was allocated for {self.max_length} tokens and cannot hold {start + n_tokens}; "
                "allocate it with a larger max_length"
            )
        self.length += n_tokens
        return start


def allocate(
    model: LT2, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | str
) -> DecodeState:
    """An empty state of an LT2 ``model`` for ``batch_size`` sequences of up to ``max_length`` tokens.

    Recurrent states are kept in fp32 at least; everything else in ``dtype``, the dtype of the activations.
    """
    slots: list[list[State]] = []
    for loop in range(model.core.n_loops):
        slots.append([])
        for block in model.core.blocks:
            spec = block.mixer.state_spec(batch_size, max_length, model.core.window(loop))
            slot = {}
            for name, (shape, own_dtype, fill) in spec.items():
                if own_dtype is None:
                    own_dtype = dtype
                elif own_dtype.is_floating_point:
                    own_dtype = torch.promote_types(own_dtype, dtype)
                slot[name] = torch.full(shape, fill, dtype=own_dtype, device=device)
            slots[-1].append(slot)
    return DecodeState(slots, batch_size, max_length)
