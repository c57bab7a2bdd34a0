"""The order of an indexed dataset: which tokens sample number g holds, as a pure function of g.

Sample g belongs to epoch ``g // n_windows``. An epoch permutes the documents, lays them in a row, cuts the
row into windows (the last partial one is dropped) and permutes the windows. Ranks share nothing but g: with R
ranks and local batches of b, the microbatch that starts at position p gives rank r the samples ``p + r * b +
[0, b)`` and the next one starts at ``p + b * R``, so the same samples make up a step of the same global batch
for any R.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from typing import Any

import numpy as np

from lt2titan.data.errors import DataError
from lt2titan.data.packing import Piece, bytes_per_target
from lt2titan.data.shuffle import permutation
from lt2titan.data.store import TokenStore

logger = logging.getLogger("lt2titan")


def n_held_out(n_documents: int, wanted: int) -> int:
    """How many of ``n_documents`` are held out: as many as wanted, a tenth of a small dataset, none of a single one."""
    n = 0 if n_documents < 2 else min(wanted, max(1, n_documents // 10))
    if n < wanted:
        logger.info(
            "data: %d documents are few: %d instead of data.holdout_documents = %d are held out", n_documents, n, wanted
        )
    return n


def split_documents(n_documents: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the documents to train on and of those held out, each ascending; the choice depends on no seed."""
    n = n_held_out(n_documents, wanted)
    order = permutation(n_documents, "held-out documents")
    return np.sort(order[n:]), np.sort(order[:n])


class DocumentRow:
    """Documents of a store laid in a row, in a given order.

    Args:
        order: (n,) ids of the documents.
    """

    def __init__(self, store: TokenStore, order: np.ndarray) -> None:
        self.store, self.order = store, order
        lengths = np.diff(store.offsets)[order]
        self.ends = np.cumsum(lengths)
        self.n_tokens = int(self.ends[-1]) if len(order) else 0

    def read(self, begin: int, end: int) -> list[Piece]:
        """Tokens [begin, end) of the row, by document; what lies behind the end of the row is left out."""
        pieces = []
        end = min(end, self.n_tokens)
        i = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            document = int(self.order[i])
            offset, next_offset = int(self.store.offsets[document]), int(self.store.offsets[document + 1])
            length, row_end = next_offset - offset, int(self.ends[i])
            skipped = begin - (row_end - length)
            taken = min(end, row_end) - begin
            if taken > 0:
                ids = self.store.tokens[offset + skipped : offset + skipped + taken]
                rate = bytes_per_target(int(self.store.n_bytes[document]), length)
                pieces.append(Piece(ids, skipped == 0, rate))
            begin, i = begin + taken, i + 1
        return pieces


class Epochs:
    """Samples of an indexed dataset by their global index.

    Args:
        documents: ids of the documents to use.
    Raises:
        DataError: fewer than seq_len + 1 tokens.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, *, seq_len: int, seed: int, shuffle: bool) -> None:
        self.store, self.documents = store, documents
        self.seq_len, self.seed, self.shuffle = seq_len, seed, shuffle
        n_tokens = int(np.diff(store.offsets)[documents].sum())
        self.n_windows = (n_tokens - 1) // seq_len
        if self.n_windows < 1:
            raise DataError(
                f"the dataset has {n_tokens} tokens to train on, fewer than one sample of training.seq_len + 1 = "
                f"{seq_len + 1}; use more text or a shorter training.seq_len"
            )
        self._lock = threading.Lock()  # or several workers would shuffle the same epoch
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)  # a batch may span two epochs

    def _make_plan(self, epoch: int) -> tuple[DocumentRow, np.ndarray]:
        if not self.shuffle:
            return DocumentRow(self.store, self.documents), np.arange(self.n_windows)
        order = self.documents[permutation(len(self.documents), "documents", self.seed, epoch)]
        return DocumentRow(self.store, order), permutation(self.n_windows, "windows", self.seed, epoch)

    def sample(self, index: int) -> list[Piece]:
        """The seq_len + 1 tokens of global sample ``index``."""
        epoch, i = divmod(index, self.n_windows)
        with self._lock:
            row, windows = self._plan(epoch)
        begin = int(windows[i]) * self.seq_len
        return row.read(begin, begin + self.seq_len + 1)

    def identity(self) -> dict[str, Any]:
        """What a data position depends on; a state is valid where this is the same."""
        documents = hashlib.blake2b(self.documents.astype(np.int64).tobytes(), digest_size=8).hexdigest()
        return {
            "kind": "indexed",
            "dataset and tokenizer (fingerprint)": self.store.fingerprint,
            "training documents (data.holdout_documents)": f"{len(self.documents)}:{documents}",
            "data.seed": self.seed,
            "data.shuffle": self.shuffle,
            "training.seq_len": self.seq_len,
        }
