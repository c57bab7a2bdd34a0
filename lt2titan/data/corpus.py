"""A dataset, opened once for training and validation, and how it is split between them."""

from __future__ import annotations

import functools
import logging

import numpy as np

from lt2titan.data.config import DataConfig
from lt2titan.data.errors import DataError
from lt2titan.data.indexed import DocumentRow, n_held_out, split_documents
from lt2titan.data.sources import is_stream, open_store, open_stream, open_tokenizer, store_of_texts
from lt2titan.data.store import TokenStore
from lt2titan.data.streaming import first_documents
from lt2titan.data.tokenizer import Tokenizer

logger = logging.getLogger("lt2titan")

ENOUGH_DOCUMENTS = 1000


class Corpus:
    """A dataset: its tokenizer, and a token store or a stream.

    Args:
        tokenizer: that of ``data``, where it is open already.
    Attributes:
        tokenizer: None for the synthetic dataset.
        stream: None for an indexed dataset, which is a ``store`` instead.
    """

    def __init__(
        self, data: DataConfig, dataset: str, dataset_path: str, vocab_size: int, tokenizer: Tokenizer | None = None
    ) -> None:
        self._data = data
        self.tokenizer = tokenizer or open_tokenizer(data, dataset, vocab_size)
        self.stream = open_stream(data, dataset_path) if is_stream(data, dataset) else None
        self._open_store = functools.partial(open_store, data, dataset, dataset_path, self.tokenizer, vocab_size)

    @functools.cached_property
    def store(self) -> TokenStore:
        """All of a dataset that is no stream, tokenised."""
        return self._open_store()

    @functools.cached_property
    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the documents of the store to train on, and of those that are held out."""
        return split_documents(self.store.n_documents, self._data.holdout_documents)

    @functools.cached_property
    def held_out_texts(self) -> list[str]:
        """Documents of the stream that are held out: its first ones.

        Whether the stream is small is found out by reading on until that many more are sure to be left for training.
        """
        wanted = self._data.holdout_documents
        enough = min(10 * wanted, wanted + ENOUGH_DOCUMENTS)
        texts = self._first_documents(enough)
        return texts[: wanted if len(texts) == enough else n_held_out(len(texts), wanted)]

    def _first_documents(self, n: int) -> list[str]:
        assert self.stream is not None
        return first_documents(self.stream, n, self._data.max_bad_rows)

    def validation_row(self, held_out: bool) -> DocumentRow:
        """The text to validate on: what is held out of training, or else all of it (of a stream the beginning).

        Raises:
            DataError: there is none.
        """
        if self._data.holdout_documents == 0 and (held_out or self.stream is not None):
            raise DataError(
                "there is nothing to validate on: data.holdout_documents = 0 and validation has no dataset that ends; "
                "raise data.holdout_documents, set validation.dataset and validation.dataset_path, or "
                "validation.no_enable"
            )
        if self.stream is not None:
            texts = self.held_out_texts if held_out else self._first_documents(self._data.holdout_documents)
            store = self._store_of(texts)
            documents = np.arange(store.n_documents)
        else:
            store = self.store
            documents = self.split[1] if held_out else np.arange(store.n_documents)
        if len(documents) == 0:
            raise DataError(
                "there is nothing to validate on: the dataset is a single document, of which nothing can be held out; "
                "set validation.dataset and validation.dataset_path, or validation.no_enable"
            )
        row = DocumentRow(store, documents)
        logger.info("data: validation text: %d documents, %s tokens", len(documents), f"{row.n_tokens:,}")
        return row

    def _store_of(self, texts: list[str]) -> TokenStore:
        assert self.tokenizer is not None  # only synthetic has none
        return store_of_texts(texts, self.tokenizer)
