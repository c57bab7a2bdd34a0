"""The datasets by name, as token stores (indexed) or as streams."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np

from lt2titan.data import synthetic
from lt2titan.data.config import DataConfig
from lt2titan.data.errors import DataError
from lt2titan.data.files import Files, FileStream
from lt2titan.data.find import find_files, find_shards
from lt2titan.data.huggingface import HuggingFace
from lt2titan.data.python_docs import PythonDocs
from lt2titan.data.store import Source, TokenStore, cached_store, store_in_memory, tokenise
from lt2titan.data.streaming import Stream
from lt2titan.data.tokenizer import Tokenizer, build_tokenizer

logger = logging.getLogger("lt2titan")

SYNTHETIC = "synthetic"
HUGGINGFACE = "huggingface"


def _python_docs(data: DataConfig, dataset_path: str) -> Source:
    """The English documentation inside every Python: real text, no download. The path is not used."""
    return PythonDocs()


def _files(data: DataConfig, dataset_path: str) -> Source:
    """Local .txt, .md, .jsonl and .parquet files. The path is a file, folder, glob pattern or a list with commas."""
    return Files(find_files(dataset_path), data.text_column, data.max_bad_rows)


def _huggingface(data: DataConfig, dataset_path: str) -> Source:
    """A dataset of the hub by its name (data.hf_name, data.hf_split), or local parquet or JSON-lines files."""
    paths = find_shards(dataset_path)
    if paths:
        return Files(paths, data.text_column, data.max_bad_rows)
    return HuggingFace(data, dataset_path, streaming=False)


TEXT_SOURCES: dict[str, Callable[[DataConfig, str], Source]] = {
    "python_docs": _python_docs,
    "files": _files,
    HUGGINGFACE: _huggingface,
}
"""Datasets of text. Besides them there is "synthetic", which has token ids and no text."""


def open_stream(data: DataConfig, dataset_path: str) -> Stream:
    """The dataset "huggingface" to be read while training, from the hub or from local files."""
    paths = find_shards(dataset_path)
    if paths:
        return FileStream(paths, data.text_column, data.max_bad_rows)
    return HuggingFace(data, dataset_path, streaming=True)


def is_stream(data: DataConfig, dataset: str) -> bool:
    """Whether ``dataset`` is read while training instead of being tokenised first."""
    return data.streaming and dataset == HUGGINGFACE


def open_tokenizer(data: DataConfig, dataset: str, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of ``dataset`` (None: synthetic), checked against the model's vocabulary."""
    if dataset == SYNTHETIC:
        return None
    tokenizer = build_tokenizer(data)
    if tokenizer.n_tokens > vocab_size:
        raise DataError(
            f"the tokenizer {data.tokenizer!r} has {tokenizer.n_tokens} tokens and the model only {vocab_size}; "
            f"raise the model's vocabulary to at least {tokenizer.n_tokens} or choose another data.tokenizer"
        )
    if tokenizer.n_tokens < vocab_size:
        logger.info("data: the tokenizer has %d tokens, the model room for %d", tokenizer.n_tokens, vocab_size)
    return tokenizer


def open_store(
    data: DataConfig, dataset: str, dataset_path: str, tokenizer: Tokenizer | None, vocab_size: int
) -> TokenStore:
    """The tokenised dataset; built and cached the first time."""
    if dataset == SYNTHETIC:
        return synthetic_store(vocab_size, dataset_path)
    if dataset not in TEXT_SOURCES:
        raise DataError(f"there is no dataset {dataset!r}; choose one of {', '.join([*TEXT_SOURCES, SYNTHETIC])}")
    assert tokenizer is not None  # only synthetic has none
    return cached_store(TEXT_SOURCES[dataset](data, dataset_path), tokenizer, data.cache_path())


def synthetic_store(vocab_size: int, dataset_path: str) -> TokenStore:
    """The synthetic dataset with the seed ``dataset_path`` ("" = 0). A token counts as one byte of text."""
    if dataset_path and not dataset_path.isdecimal():
        raise DataError(
            f"synthetic: dataset_path is the seed of its language, a whole number or empty, not {dataset_path!r}"
        )
    tokens, offsets = synthetic.generate(vocab_size, int(dataset_path or 0))
    return store_in_memory(tokens, offsets, np.diff(offsets))


def store_of_texts(texts: Iterable[str], tokenizer: Tokenizer) -> TokenStore:
    """A store in memory of a few documents."""
    documents: list[np.ndarray] = []
    n_bytes: list[int] = []
    for ids, sizes in tokenise(texts, tokenizer):
        documents += ids
        n_bytes += sizes
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype(np.int64)
    return store_in_memory(np.concatenate(documents), offsets, np.array(n_bytes, np.int64))
