"""Loaders of batches for training and validation, from any dataset."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from lt2titan.data.check import is_same_text, shared_files, validation_text
from lt2titan.data.config import DataConfig
from lt2titan.data.corpus import Corpus
from lt2titan.data.errors import DataError
from lt2titan.data.indexed import Epochs
from lt2titan.data.orders import IndexedOrder, Share, StreamOrder
from lt2titan.data.packing import Batch, BatchLayout
from lt2titan.data.streaming import DocumentReader, StreamPacker, text_hash
from lt2titan.data.training import TrainLoader
from lt2titan.data.validation import ValidationLoader

__all__ = ["Batch", "TrainLoader", "ValidationLoader", "ValidationText", "build_loaders", "build_validation_loader"]

logger = logging.getLogger("lt2titan")


@dataclass(frozen=True, kw_only=True)
class ValidationText:
    """What to validate on; "" is training's. ``steps``: batches of a pass, -1 until the text ends.

    With ``enable`` False there is no validation, but training leaves out the same documents as if there were, so that
    validation can be switched on and off without changing the training order.
    """

    dataset: str = ""
    dataset_path: str = ""
    seq_len: int
    local_batch_size: int
    steps: int = -1
    enable: bool = True


def build_loaders(
    data: DataConfig,
    *,
    dataset: str,
    dataset_path: str,
    seq_len: int,
    local_batch_size: int,
    dp_rank: int,
    dp_size: int,
    vocab_size: int,
    validation: ValidationText | None,
    stretch: int = 0,
    n_stretches: int = 1,
    pin_memory: bool = False,
) -> tuple[TrainLoader, ValidationLoader | None]:
    """Loaders of one rank for training and validation; each source is opened once.

    Whole documents (data.holdout_documents) are held out of training, unless validation has a text of its own, which
    it then takes all of.

    Args:
        dataset: one of ``DATASET_NAMES``; dataset_path: what it reads (see ``sources``).
        vocab_size: tokens that the model has room for; the synthetic dataset uses all of them.
        validation: None: on training's text, but without a loader for it.
        stretch, n_stretches: which part of every sample, of how many (context parallelism).
    Raises:
        DataError, ConfigError: unusable data, tokenizer or settings, naming the file or key.
    """
    if data.streaming and dataset != "huggingface":
        raise DataError(f"data.streaming = true needs training.dataset = 'huggingface', not {dataset!r}")
    text = own = (dataset, dataset_path)
    if validation is not None:
        own = validation_text(text, validation.dataset, validation.dataset_path)
    held_out = is_same_text(text, own)
    if not held_out and (shared := shared_files(text, own)):
        logger.warning("data: %d files are trained and validated on, such as %s", len(shared), shared[0])
    corpus = Corpus(data, dataset, dataset_path, vocab_size)
    share = Share(local_batch_size=local_batch_size, dp_rank=dp_rank, dp_size=dp_size)
    build_order = _indexed_order if corpus.stream is None else _stream_order
    train_loader = TrainLoader(
        build_order(data, corpus, batch_layout(data, seq_len, stretch, n_stretches), share, held_out),
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor,
        pin_memory=pin_memory,
    )
    if validation is None or not validation.enable:
        return train_loader, None
    validation_corpus = corpus if held_out else Corpus(data, *own, vocab_size, tokenizer=corpus.tokenizer)
    validation_loader = ValidationLoader(
        validation_corpus.validation_row(held_out),
        batch_layout(data, validation.seq_len, stretch, n_stretches),
        Share(local_batch_size=validation.local_batch_size, dp_rank=dp_rank, dp_size=dp_size),
        steps=validation.steps,
        pin_memory=pin_memory,
    )
    return train_loader, validation_loader


def build_validation_loader(
    data: DataConfig,
    *,
    dataset: str,
    dataset_path: str,
    seq_len: int,
    local_batch_size: int,
    dp_rank: int,
    dp_size: int,
    vocab_size: int,
    steps: int,
    holdout: bool = True,
) -> ValidationLoader:
    """Validation batches of one rank, without training.

    Args:
        holdout: True: the documents that ``build_loaders`` leaves out of training on this dataset. False: all of it,
            or of a stream its first ``data.holdout_documents`` documents.
        steps: batches of a pass (-1, or more than there are: until the text ends).
    Raises:
        DataError, ConfigError: as for ``build_loaders``; nothing to validate on.
    """
    row = Corpus(data, dataset, dataset_path, vocab_size).validation_row(holdout)
    share = Share(local_batch_size=local_batch_size, dp_rank=dp_rank, dp_size=dp_size)
    return ValidationLoader(row, batch_layout(data, seq_len), share, steps=steps)


def batch_layout(data: DataConfig, seq_len: int, stretch: int = 0, n_stretches: int = 1) -> BatchLayout:
    """What every batch of samples of ``seq_len`` tokens looks like, or of a stretch of them."""
    return BatchLayout(
        seq_len=seq_len,
        document_mask=data.document_mask,
        max_documents_per_sample=data.max_documents_per_sample,
        stretch=stretch,
        n_stretches=n_stretches,
    )


def _indexed_order(data: DataConfig, corpus: Corpus, layout: BatchLayout, share: Share, hold_out: bool) -> IndexedOrder:
    store = corpus.store
    documents = corpus.split[0] if hold_out else np.arange(store.n_documents)
    epochs = Epochs(store, documents, seq_len=layout.seq_len, seed=data.seed, shuffle=data.shuffle)
    logger.info(
        "data: an epoch is %s samples of %d tokens; %d of %d documents are held out for validation",
        f"{epochs.n_windows:,}",
        layout.seq_len,
        store.n_documents - len(documents),
        store.n_documents,
    )
    return IndexedOrder(epochs, layout, share)


def _stream_order(data: DataConfig, corpus: Corpus, layout: BatchLayout, share: Share, hold_out: bool) -> StreamOrder:
    stream, tokenizer = corpus.stream, corpus.tokenizer
    assert stream is not None and tokenizer is not None  # only synthetic has no tokenizer
    held_out = frozenset(map(text_hash, corpus.held_out_texts if hold_out else []))
    reader = DocumentReader(
        stream,
        dp_rank=share.dp_rank,
        dp_size=share.dp_size,
        seed=data.seed,
        shuffle=data.shuffle,
        held_out=held_out,
        max_bad_rows=data.max_bad_rows,
    )
    logger.info(
        "data: streaming %s: each rank reads 1/%d of its %d shards and takes 1 in %d of their documents; %d documents "
        "are held out for validation",
        stream.name,
        reader.n_groups,
        stream.n_shards,
        reader.group_size,
        len(held_out),
    )
    packer = StreamPacker(
        reader,
        tokenizer,
        seq_len=layout.seq_len,
        block_size=data.shuffle_buffer,
        shuffle=data.shuffle,
        seed=data.seed,
    )
    identity = {
        "kind": "streaming",
        "dataset": stream.identity,
        "number of shards": stream.n_shards,
        "tokenizer": tokenizer.key,
        "data.holdout_documents": len(held_out),
        "data.seed": data.seed,
        "data.shuffle": data.shuffle,
        "data.shuffle_buffer": data.shuffle_buffer,
        "training.seq_len": layout.seq_len,
        "data-parallel degree": share.dp_size,
        "data-parallel rank": share.dp_rank,
    }
    return StreamOrder(packer, identity, layout, share)
