"""Windows of packed documents, and the batches that the model sees.

A dataset is one long row of documents. Window i covers its tokens ``[i * seq_len, (i + 1) * seq_len]``: the
first ``seq_len`` are inputs, the last ``seq_len`` are targets, and neighbours overlap by one token, so that
every token but the very first is a target exactly once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lt2titan.kernels.packing import make_chunk_indices

logger = logging.getLogger("lt2titan")

IGNORED = -100
"""Target where nothing is predicted; what ``torch.nn.functional.cross_entropy`` ignores."""


class Batch(NamedTuple):
    """One microbatch of one rank. B samples of L tokens.

    Attributes:
        tokens: (B, L) int64.
        targets: (B, L) int64, the next token; -100 where nothing is predicted: padding and, with a document
            mask, the last token of a document (its successor belongs to another document).
        positions: (B, L) int64, position in the sample or, with a document mask, in the document's part of
            the sample.
        cu_seqlens: None, or with a document mask (n + 1,) int32 boundaries of the documents in the flattened
            (B * L) tokens; every sample's end is one. Padded with B * L to a fixed length (see
            ``document_boundaries``).
        n_bytes: () float64, UTF-8 bytes of text that the targets stand for. A document's bytes are spread
            evenly over its tokens but the first, so over whole documents it is exact: bits per byte = nats /
            (ln 2 * n_bytes).
        chunk_indices: with cu_seqlens, what packed GPU kernels derive from it (kernels.packing.make_chunk_indices):
            made here, where threads prepare batches ahead, since asking the device would stall it.
        cu_seqlens_k: None, or of a stretch with cu_seqlens (n + 1,) int32 boundaries of the same documents over the
            rows from their first token to the stretch's last, flattened: where their keys lie for attention.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor | None
    n_bytes: torch.Tensor
    chunk_indices: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None = None

    def stretch(self, index: int, n_stretches: int) -> Batch:
        """One of n equal parts of every row, for ranks that share rows (context parallelism).

        A document that has no token in it is empty in its cu_seqlens. The bytes are divided over the parts.
        """
        n_rows, whole = self.tokens.shape
        length = whole // n_stretches
        start, stop = index * length, (index + 1) * length
        tokens, targets, positions = (
            x[:, start:stop].contiguous() for x in (self.tokens, self.targets, self.positions)
        )
        cu_seqlens = cu_seqlens_k = None
        if self.cu_seqlens is not None:
            bounds = self.cu_seqlens.long()
            row = (bounds // whole).clamp(max=n_rows - 1)
            in_row = bounds - row * whole
            cu_seqlens = (row * length + (in_row - start).clamp(0, length)).int()
            cu_seqlens_k = (row * stop + in_row.clamp(max=stop)).int()
        chunk_indices = None if cu_seqlens is None else make_chunk_indices(cu_seqlens)
        n_bytes = self.n_bytes / n_stretches
        return Batch(tokens, targets, positions, cu_seqlens, n_bytes, chunk_indices, cu_seqlens_k)

    def pinned(self) -> Batch:
        """The same in page-locked memory, from which copies to a GPU need not be waited for."""
        return Batch(*(None if tensor is None else tensor.pin_memory() for tensor in self))  # type: ignore[arg-type]


class Piece(NamedTuple):
    """Consecutive tokens of one document."""

    ids: np.ndarray
    is_start: bool  # whether ids[0] is the document's first token
    bytes_per_target: float  # text bytes for each token of the document but its first


def bytes_per_target(n_bytes: int, n_tokens: int) -> float:
    """Bytes for each token but the first of a document of ``n_tokens`` tokens."""
    return n_bytes / (n_tokens - 1) if n_tokens > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """What a batch looks like: seq_len = L, whether documents see each other, and which stretch of the samples it has
    (of how many, which must divide L)."""

    seq_len: int
    document_mask: bool = False
    max_documents_per_sample: int = 64
    stretch: int = 0
    n_stretches: int = 1

    def __post_init__(self) -> None:
        if self.seq_len % self.n_stretches or not 0 <= self.stretch < self.n_stretches:
            raise ValueError(
                f"samples of {self.seq_len} tokens have no stretch {self.stretch} of {self.n_stretches} equal ones"
            )

    def assemble(self, windows: Sequence[Sequence[Piece]]) -> Batch:
        """Lay windows of at most L + 1 tokens out as a batch; a shorter one is filled up with ignored targets."""
        n_rows, length = len(windows), self.seq_len
        tokens_BL1 = np.zeros((n_rows, length + 1), np.int64)
        targets_BL = np.full((n_rows, length), IGNORED, np.int64)
        positions_BL = np.tile(np.arange(length, dtype=np.int64), (n_rows, 1))
        boundaries = [0]
        n_bytes = 0.0
        for row, pieces in enumerate(windows):
            end = 0
            starts: list[int] = []
            for piece in pieces:
                begin, end = end, end + len(piece.ids)
                tokens_BL1[row, begin:end] = piece.ids
                starts.append(begin)
                n_bytes += piece.bytes_per_target * (end - begin - (piece.is_start or begin == 0))
            if end > 1:
                targets_BL[row, : end - 1] = tokens_BL1[row, 1:end]
            if self.document_mask:
                targets_BL[row, [begin - 1 for begin in starts[1:]]] = IGNORED
                starts = [s for s in [*starts, end] if s < length] or [0]
                for begin, stop in zip(starts, [*starts[1:], length], strict=True):
                    positions_BL[row, begin:stop] -= begin
                boundaries += [row * length + s for s in starts[1:]] + [(row + 1) * length]
        cu_seqlens = self.document_boundaries(boundaries, n_rows) if self.document_mask else None
        batch = Batch(
            tokens=torch.from_numpy(np.ascontiguousarray(tokens_BL1[:, :length])),
            targets=torch.from_numpy(targets_BL),
            positions=torch.from_numpy(positions_BL),
            cu_seqlens=cu_seqlens,
            n_bytes=torch.tensor(n_bytes, dtype=torch.float64),
            chunk_indices=None if cu_seqlens is None else make_chunk_indices(cu_seqlens),
        )
        return batch if self.n_stretches == 1 else batch.stretch(self.stretch, self.n_stretches)

    def document_boundaries(self, boundaries: list[int], n_rows: int) -> torch.Tensor:
        """``boundaries`` padded with n_rows * L to n_rows * max_documents_per_sample + 1.

        A batch of more documents doubles max_documents_per_sample until they fit.
        """
        room = self.max_documents_per_sample
        while n_rows * room + 1 < len(boundaries):
            room *= 2
        if room != self.max_documents_per_sample:
            _say_once(self.max_documents_per_sample, room)
        padded = np.full(n_rows * room + 1, n_rows * self.seq_len, np.int32)
        padded[: len(boundaries)] = boundaries
        return torch.from_numpy(padded)


@functools.cache
def _say_once(configured: int, room: int) -> None:
    logger.warning(
        "data: a batch holds more documents than data.max_documents_per_sample = %d allows; its cu_seqlens has room "
        "for %d per sample (a compiled model compiles once more: raise the setting to avoid that)",
        configured,
        room,
    )
