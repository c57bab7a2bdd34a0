"""The order of a streaming dataset: documents of this rank's shards, shuffled in blocks, packed as they come.

The rows of a stream are read in order, so its position is not one number. To resume exactly with a small
state, the shuffle works on blocks: ``data.shuffle_buffer`` documents are read, permuted by a key, and packed.
The state then is where the block began in the stream, how far in the block packing is, and the offset in that
document; to resume, the block is read again. (The buffer of ``datasets`` loses its content on resume.) While
a block is packed, the next one is read document by document, so that reading is spread evenly over the
batches.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np

from lt2titan.data.errors import BadRows, DataError, Malformed
from lt2titan.data.packing import Piece, bytes_per_target
from lt2titan.data.shuffle import permutation
from lt2titan.data.tokenizer import Tokenizer

logger = logging.getLogger("lt2titan")

DOCUMENTS_PER_ENCODE = 16


class Stream(Protocol):
    """A dataset read in order, in shards."""

    name: str
    n_shards: int
    identity: str
    """What a data state refers to."""

    def shard_rows(self, shard: int, first_row: int) -> Iterator[tuple[int, str | Malformed]]:
        """(row number, text) of one shard from ``first_row`` on; the same each time."""


@dataclass(frozen=True)
class ReadPosition:
    """Where reading goes on: the ``shard``-th shard of this rank in ``epoch``, at ``row`` of it, after ``n_bad_rows``
    malformed rows of this rank in this epoch."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    n_bad_rows: int = 0


@dataclass(frozen=True)
class PackPosition:
    """Where the next window begins: token ``offset`` of document ``document`` of the block read from
    ``block_start``."""

    block_start: ReadPosition = field(default_factory=ReadPosition)
    document: int = 0
    offset: int = 0

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self.block_start), "document": self.document, "offset": self.offset}

    @classmethod
    def from_dict(cls, state: dict[str, int]) -> PackPosition:
        start = ReadPosition(state["epoch"], state["shard"], state["row"], state.get("n_bad_rows", 0))
        return cls(start, state["document"], state["offset"])


def text_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def first_documents(stream: Stream, n: int, max_bad_rows: int) -> list[str]:
    """The first ``n`` documents of the stream, each text once."""
    texts: dict[str, None] = {}
    bad_rows = BadRows(max_bad_rows)  # apart from those of training: every rank reads these rows
    for shard in range(stream.n_shards if n else 0):
        for _, text in stream.shard_rows(shard, 0):
            if isinstance(text, Malformed):
                bad_rows.add(text)
            elif text:
                texts[text] = None
            if len(texts) == n:
                return list(texts)
    return list(texts)


class DocumentReader:
    """Documents of one rank, epoch after epoch.

    An epoch permutes the shards and deals them to gcd(n_shards, dp_size) groups of ranks; the ranks of a
    group read the same shards and take turns in taking a document. So no document goes to two ranks, and a
    rank reads no more than it must.

    Args:
        held_out: hashes of documents to leave out.
        max_bad_rows: malformed rows among this rank's share of an epoch that are skipped.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool,
        held_out: frozenset[bytes],
        max_bad_rows: int,
    ) -> None:
        self.stream, self.dp_rank, self.seed, self.shuffle = stream, dp_rank, seed, shuffle
        self.held_out, self.max_bad_rows = held_out, max_bad_rows
        self.n_groups = math.gcd(stream.n_shards, dp_size)
        self.group, self.turn = dp_rank % self.n_groups, dp_rank // self.n_groups
        self.group_size = dp_size // self.n_groups

    def _shards(self, epoch: int) -> np.ndarray:
        n_shards = self.stream.n_shards
        order = permutation(n_shards, "shards", self.seed, epoch) if self.shuffle else np.arange(n_shards)
        return order[self.group :: self.n_groups]

    def read(self, start: ReadPosition) -> Iterator[tuple[str | None, ReadPosition]]:
        """(document, position after it) from ``start`` on, without end; (None, ...) marks the end of an epoch."""
        epoch, first_shard, first_row = start.epoch, start.shard, start.row
        bad_rows = BadRows(self.max_bad_rows, start.n_bad_rows)
        while True:
            n_read = int((first_shard, first_row) != (0, 0))  # the rest of an epoch may well hold nothing
            shards = self._shards(epoch)
            for i in range(first_shard, len(shards)):
                for row, text in self.stream.shard_rows(int(shards[i]), first_row):
                    if row % self.group_size != self.turn:
                        continue
                    if isinstance(text, Malformed):
                        bad_rows.add(text)
                    elif text and text_hash(text) not in self.held_out:
                        n_read += 1
                        yield text, ReadPosition(epoch, i, row + 1, bad_rows.count)
                first_row = 0
            if n_read == 0:
                raise DataError(
                    f"{self.stream.name}: data-parallel rank {self.dp_rank} finds no document to train on in a whole "
                    "epoch; use fewer ranks, more text, or a smaller data.holdout_documents"
                )
            epoch, first_shard, bad_rows = epoch + 1, 0, BadRows(self.max_bad_rows)
            yield None, ReadPosition(epoch)


class _Block:
    """Documents that are shuffled together. ``start`` is where in the stream the first one was looked for."""

    def __init__(self, start: ReadPosition, size: int) -> None:
        self.start, self.size = start, size
        self.texts: list[str] = []
        self.end: ReadPosition | None = None  # set when the block is full or the epoch ends

    def add_from(self, rows: Iterator[tuple[str | None, ReadPosition]]) -> None:
        """Read one document, unless the block is closed."""
        if self.end is None:
            text, position = next(rows)
            if text is not None:
                self.texts.append(text)
            if text is None or len(self.texts) == self.size:
                self.end = position


class StreamPacker:
    """Windows of seq_len + 1 tokens of one rank's documents.

    Args:
        block_size: documents that are shuffled together (without shuffle only the reading ahead).
    """

    def __init__(
        self,
        reader: DocumentReader,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        block_size: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.reader, self.tokenizer = reader, tokenizer
        self.seq_len, self.block_size, self.shuffle, self.seed = seq_len, block_size, shuffle, seed

    def _order(self, block: _Block) -> np.ndarray:
        n = len(block.texts)
        if not self.shuffle:
            return np.arange(n)
        start = block.start
        return permutation(n, "block", self.seed, self.reader.dp_rank, start.epoch, start.shard, start.row)

    def _documents(self, start: PackPosition) -> Iterator[tuple[PackPosition, np.ndarray, float]]:
        """(its position, its ids, bytes per target) of each document from ``start.document`` on."""
        rows = self.reader.read(start.block_start)
        block, first = _Block(start.block_start, self.block_size), start.document
        while True:
            while block.end is None:
                block.add_from(rows)
            order = self._order(block)
            following = _Block(block.end, self.block_size)
            for i in range(first, len(order), DOCUMENTS_PER_ENCODE):
                texts = [block.texts[j] for j in order[i : i + DOCUMENTS_PER_ENCODE]]
                documents = self.tokenizer.encode_documents(texts, self.tokenizer.dtype)
                for k, (text, ids) in enumerate(zip(texts, documents, strict=True)):
                    following.add_from(rows)
                    rate = bytes_per_target(len(text.encode()), len(ids))
                    yield PackPosition(block.start, i + k), ids, rate
            block, first = following, 0

    def windows(self, start: PackPosition) -> Iterator[tuple[list[Piece], PackPosition]]:
        """(window, position of the next window) from ``start`` on, without end."""
        window: list[Piece] = []
        missing = self.seq_len + 1
        offset = start.offset
        for position, ids, rate in self._documents(start):
            while True:
                taken = min(missing, len(ids) - offset)
                if taken:
                    window.append(Piece(ids[offset : offset + taken], offset == 0, rate))
                offset, missing = offset + taken, missing - taken
                if missing:
                    break
                offset -= 1  # neighbouring windows overlap by one token
                yield window, PackPosition(position.block_start, position.document, offset)
                window, missing = [], self.seq_len + 1
            offset = 0
