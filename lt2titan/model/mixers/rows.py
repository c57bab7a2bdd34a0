"""Packed documents as rows of a batch, for mixers that look back into a decode state."""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.model.context import Context


class DocumentRows:
    """One row per document, its tokens at the right, so that equal columns are equally far from a document's end; the
    leftmost places of shorter documents are gaps."""

    def __init__(self, context: Context) -> None:
        cu_seqlens, self.width, n_tokens = context.cu_seqlens, context.max_seqlen, context.positions.shape[1]
        assert cu_seqlens is not None
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        device = starts.device
        self.n_rows = len(starts)
        self.row = torch.arange(self.n_rows, device=device).repeat_interleave(ends - starts, output_size=n_tokens)
        self.column = torch.arange(n_tokens, device=device) + self.width - ends[self.row]

    def unpack(self, x: Tensor, fill: int = 0) -> Tensor:
        """(1, n_tokens, ...) -> (n_rows, width, ...), gaps filled."""
        rows = x.new_full((self.n_rows, self.width, *x.shape[2:]), fill)
        return rows.index_put((self.row, self.column), x[0])

    def pack(self, rows: Tensor) -> Tensor:
        """The inverse of `unpack`."""
        return rows[self.row, self.column][None]
