"""The decode state: what a model remembers of the sequences it is generating."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lt2titan.model.mixers.base import State, StateSpec

if TYPE_CHECKING:
    from lt2titan.model.lt2 import LT2

Specs = dict[str, StateSpec]


class DecodeState:
    """One slot per (loop, layer), allocated once for a batch and a maximal length, updated in place.

    A looped model visits a layer once per loop with other inputs, so every visit has keys, recurrent state and
    convolution taps of its own: without that, generation does not match the full forward pass.

    Attributes:
        slots: ``slots[loop][layer]``, tensors by name, all with the sequences as their first dimension.
        lengths: (batch_size,) int64 on the device, tokens that each sequence holds. The host counts them too, so that
            a full state is refused without waiting for the device.
    """

    def __init__(
        self, specs: Sequence[Sequence[Specs]], batch_size: int, max_length: int, device: torch.device | str
    ) -> None:
        """Empty. ``specs[loop][layer]`` name the tensors' shapes, types (never None) and initial values."""
        self.batch_size, self.max_length = batch_size, max_length
        self._specs = specs
        self.slots: list[list[State]] = [
            [
                {name: torch.full(t.shape, t.fill, dtype=t.dtype, device=device) for name, t in spec.items()}
                for spec in loop
            ]
            for loop in specs
        ]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._n_held = [0] * batch_size  # the same on the host

    @property
    def n_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(t.numel() * t.element_size() for loop in self.slots for slot in loop for t in slot.values())

    def reserve(self, n_tokens: Sequence[int]) -> None:
        """Count ``n_tokens[i]`` more tokens in sequence i, on the host; whoever replays a CUDA graph must call it, for
        the graph moves ``lengths`` alone.

        Raises:
            ValueError: the state was allocated for fewer tokens; it is left as it was.
        """
        n_held = [held + n for held, n in zip(self._n_held, n_tokens, strict=True)]
        if max(n_held) > self.max_length:
            raise ValueError(
                f"the decode state was allocated for {self.max_length} tokens and cannot hold {max(n_held)} (sequence "
                f"{n_held.index(max(n_held))}); allocate it with a larger max_length"
            )
        self._n_held = n_held

    def advance(self, n_tokens: int) -> Tensor:
        """Make room for ``n_tokens`` more in every sequence and return their positions (batch_size, n_tokens).

        Raises as `reserve`.
        """
        self.reserve([n_tokens] * self.batch_size)
        positions = self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)
        self.lengths += n_tokens
        return positions

    def advance_packed(self, bounds: Sequence[int], cu_seqlens: Tensor) -> Tensor:
        """As `advance`, for packed documents of which the n-th continues sequence n; positions (1, n_tokens).

        Args:
            bounds: the values of cu_seqlens.
            cu_seqlens: (batch_size + 1,) int32 on the device of the state.
        """
        if len(bounds) - 1 != self.batch_size:
            raise ValueError(
                f"cu_seqlens bounds {len(bounds) - 1} documents and the decode state holds {self.batch_size} "
                "sequences: give one document for each, empty where a sequence gets no tokens"
            )
        self.reserve([end - start for start, end in pairwise(bounds)])
        starts, counts = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        offsets = (self.lengths - starts).repeat_interleave(counts, output_size=bounds[-1])
        self.lengths += counts
        return (offsets + torch.arange(bounds[-1], device=offsets.device))[None]

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget the chosen sequences, by default all; the others stay."""
        rows = list(range(self.batch_size)) if rows is None else self._checked(rows)
        index = torch.tensor(rows, dtype=torch.int64, device=self.lengths.device)
        for specs, slots in zip(self._specs, self.slots, strict=True):
            for spec, slot in zip(specs, slots, strict=True):
                for name, tensor in slot.items():
                    tensor.index_fill_(0, index, spec[name].fill)
        self.lengths.index_fill_(0, index, 0)
        for row in rows:
            self._n_held[row] = 0

    def select(self, rows: Sequence[int]) -> None:
        """Sequence i becomes what sequence ``rows[i]`` was: reorders, repeats or drops them, as beam search does.

        With as many rows as before every tensor is updated in place; else the tensors are replaced.
        """
        rows = self._checked(rows)
        if not rows:
            raise ValueError("select needs at least one sequence")
        in_place = len(rows) == self.batch_size
        index = torch.tensor(rows, dtype=torch.int64, device=self.lengths.device)
        for slots in self.slots:
            for slot in slots:
                for name, tensor in slot.items():
                    chosen = tensor.index_select(0, index)
                    slot[name] = tensor.copy_(chosen) if in_place else chosen
        lengths = self.lengths.index_select(0, index)
        self.lengths = self.lengths.copy_(lengths) if in_place else lengths
        self._n_held = [self._n_held[row] for row in rows]
        self.batch_size = len(rows)

    def _checked(self, rows: Sequence[int]) -> list[int]:
        wrong = [row for row in rows if not 0 <= row < self.batch_size]
        if wrong:
            raise ValueError(f"the decode state holds sequences 0 to {self.batch_size - 1} and has no {wrong}")
        return list(rows)


def allocate(
    model: LT2, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | str
) -> DecodeState:
    """An empty state of an LT2 ``model`` for ``batch_size`` sequences of up to ``max_length`` tokens each.

    Recurrent states are kept in fp32 at least; everything else in ``dtype``, the dtype of the activations.

    Raises:
        ValueError: there is nothing to hold, or a mixer's tensors do not start with the batch, or the heads are
            split over ranks.
    """
    if batch_size < 1 or max_length < 1:
        raise ValueError(f"a decode state needs sequences and tokens, got {batch_size} of up to {max_length}")
    if any(block.mixer.share.n_ranks > 1 for block in model.core.blocks):
        raise ValueError("a model split by tensor parallelism does not decode: load its checkpoint into one process")
    specs: list[list[Specs]] = []
    for loop in range(model.core.n_loops):
        specs.append([])
        for block in model.core.blocks:
            spec = {}
            for name, tensor in block.mixer.state_spec(batch_size, max_length, model.core.window(loop)).items():
                if tensor.shape[0] != batch_size:
                    raise ValueError(f"{type(block.mixer).__name__}: state {name!r} {tensor.shape} is not batch-first")
                own_dtype = dtype if tensor.dtype is None else tensor.dtype
                if own_dtype.is_floating_point:
                    own_dtype = torch.promote_types(own_dtype, dtype)
                spec[name] = tensor._replace(dtype=own_dtype)
            specs[-1].append(spec)
    return DecodeState(specs, batch_size, max_length, device)
