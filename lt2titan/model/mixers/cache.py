"""Keys that a decode state holds: where new tokens are written, and packed documents as rows that continue it.

A state of keys is a ring: the token at position p stands in slot p mod capacity, and ``state["positions"]`` says which
position each slot holds (-1: none).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.model.context import Context
from lt2titan.model.mixers.base import State


class DocumentRows:
    """One row per packed document, its tokens at the right, so that equal columns are equally far from a document's
    end. What is left of them are gaps."""

    def __init__(self, context: Context, n_tokens: int) -> None:
        assert context.cu_seqlens is not None
        starts, ends = context.cu_seqlens[:-1].long(), context.cu_seqlens[1:].long()
        self._n_rows, self._width = len(starts), context.max_seqlen
        self._rows = torch.arange(self._n_rows, device=starts.device)
        self._rows = self._rows.repeat_interleave(ends - starts, output_size=n_tokens)
        self._columns = torch.arange(n_tokens, device=starts.device) + self._width - ends[self._rows]

    def unpack(self, x: Tensor, fill: int = 0) -> Tensor:
        """(1, L, ...) -> (N, width, ...), ``fill`` in the gaps."""
        rows = x.new_full((self._n_rows, self._width, *x.shape[2:]), fill)
        return rows.index_put((self._rows, self._columns), x[0])

    def pack(self, y: Tensor) -> Tensor:
        """Inverse of `unpack`."""
        return y[self._rows, self._columns][None]


def write(state: State, new: State, has_gaps: bool) -> None:
    """Put the last tokens of each row of ``new`` (B, L, ...) into their slots; a gap's slot keeps what it holds."""
    positions, capacity = new["positions"], state["positions"].shape[1]
    n_columns = min(positions.shape[1], capacity)
    to_end = torch.arange(n_columns - 1, -1, -1, device=positions.device)
    slots = (positions[:, -1:] - to_end) % capacity  # consecutive, gaps included: no slot twice in a row
    is_token = positions[:, -n_columns:] >= 0
    for name, tensor in new.items():
        tensor, trailing = tensor[:, -n_columns:], (1,) * (tensor.dim() - 2)
        index = slots.view(*slots.shape, *trailing).expand_as(tensor)
        if has_gaps:
            tensor = torch.where(is_token.view(*slots.shape, *trailing), tensor, state[name].gather(1, index))
        state[name].scatter_(1, index, tensor)
