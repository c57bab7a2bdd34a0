"""Batches for validation: all of a text, once."""

from __future__ import annotations

from collections.abc import Iterator

from lt2titan.data.errors import DataError
from lt2titan.data.indexed import DocumentRow
from lt2titan.data.orders import Share
from lt2titan.data.packing import Batch, BatchLayout


class ValidationLoader:
    """The same batches in each pass; over all ranks they hold every target of the documents once.

    Every rank has the same number of batches: where the text runs out, samples are ignored targets.

    Args:
        steps: batches of a pass (-1, or more than there are: until the text ends).
    Attributes:
        n_batches: batches of a pass, on each rank.
    """

    def __init__(
        self, row: DocumentRow, layout: BatchLayout, share: Share, *, steps: int, pin_memory: bool = False
    ) -> None:
        self._row, self._layout, self._share, self._pin_memory = row, layout, share, pin_memory
        n_windows = -(-(row.n_tokens - 1) // layout.seq_len)
        if n_windows < 1:
            raise DataError(f"the validation text has {row.n_tokens} tokens; it needs at least 2: use more text")
        n_batches = -(-n_windows // share.samples_per_microbatch)
        self.n_batches = n_batches if steps < 0 else min(steps, n_batches)

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Batch]:
        n, length = self._share.local_batch_size, self._layout.seq_len
        for step in range(self.n_batches):
            first = step * self._share.samples_per_microbatch + self._share.dp_rank * n
            begins = range(first * length, (first + n) * length, length)
            batch = self._layout.assemble([self._row.read(begin, begin + length + 1) for begin in begins])
            yield batch.pinned() if self._pin_memory else batch
