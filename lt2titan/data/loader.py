"""Batches for training and validation from any dataset, with a state that resumes exactly."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from lt2titan.data.config import DataConfig
from lt2titan.data.errors import DataError
from lt2titan.data.huggingface import HuggingFace
from lt2titan.data.indexed import DocumentRow, Epochs, split_documents
from lt2titan.data.packing import Batch, BatchLayout
from lt2titan.data.sources import HUGGINGFACE, is_stream, open_store, open_tokenizer, store_of_texts
from lt2titan.data.store import TokenStore
from lt2titan.data.streaming import DocumentReader, PackPosition, StreamPacker, first_documents, text_hash
from lt2titan.data.tokenizer import Tokenizer

logger = logging.getLogger("lt2titan")

T = TypeVar("T")
Progress = dict[str, int]  # "position" (samples over all ranks) and, for a stream, a PackPosition


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one data-parallel rank takes: ``local_batch_size`` samples of each microbatch."""

    local_batch_size: int
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"data-parallel rank {self.dp_rank} is not one of {self.dp_size}")
        if self.local_batch_size < 1:
            raise ValueError(f"training.local_batch_size = {self.local_batch_size} must be at least 1")

    @property
    def samples_per_microbatch(self) -> int:
        return self.local_batch_size * self.dp_size


class _Order(Protocol):
    """The order of a dataset for one rank: the batches after a given progress, as tasks to be run in order."""

    max_threads: int
    samples_per_epoch: int

    def identity(self) -> dict[str, Any]: ...

    def tasks(self, progress: Progress) -> Iterator[Callable[[], tuple[Batch, Progress]]]: ...


class _IndexedOrder:
    """Batches are functions of the position, so several threads may make them."""

    max_threads = 64

    def __init__(self, epochs: Epochs, layout: BatchLayout, share: Share) -> None:
        self.epochs, self.layout, self.share = epochs, layout, share
        self.samples_per_epoch = epochs.n_windows

    def identity(self) -> dict[str, Any]:
        return self.epochs.identity()

    def tasks(self, progress: Progress) -> Iterator[Callable[[], tuple[Batch, Progress]]]:
        for position in itertools.count(progress["position"], self.share.samples_per_microbatch):
            yield functools.partial(self._make, position)

    def _make(self, position: int) -> tuple[Batch, Progress]:
        n = self.share.local_batch_size
        first = position + self.share.dp_rank * n
        windows = [self.epochs.sample(index) for index in range(first, first + n)]
        return self.layout.assemble(windows), {"position": position + self.share.samples_per_microbatch}


class _StreamOrder:
    """Batches follow from each other, so one thread at a time may make them."""

    max_threads = 1
    samples_per_epoch = 0

    def __init__(self, packer: StreamPacker, identity: dict[str, Any], layout: BatchLayout, share: Share) -> None:
        self.packer, self.layout, self.share = packer, layout, share
        self._identity = identity

    def identity(self) -> dict[str, Any]:
        return self._identity

    def tasks(self, progress: Progress) -> Iterator[Callable[[], tuple[Batch, Progress]]]:
        start = PackPosition.from_dict(progress) if "document" in progress else PackPosition()
        batches = self._batches(start, progress["position"])
        return itertools.repeat(functools.partial(next, batches))

    def _batches(self, start: PackPosition, position: int) -> Iterator[tuple[Batch, Progress]]:
        windows = self.packer.windows(start)
        while True:
            taken = list(itertools.islice(windows, self.share.local_batch_size))
            position += self.share.samples_per_microbatch
            yield (
                self.layout.assemble([w for w, _ in taken]),
                {"position": position, **taken[-1][1].to_dict()},
            )


class TrainLoader:
    """Batches of one data-parallel rank, without end.

    ``iter()`` goes on after the last batch that was handed out (batches prepared ahead do not count) or from
    where ``load_state_dict`` says; take a new iterator after loading.

    Attributes:
        tokenizer: None for the synthetic dataset.
        samples_per_epoch: over all ranks; 0 if not known (a stream).
    """

    def __init__(self, order: _Order, tokenizer: Tokenizer | None, data: DataConfig, *, pin_memory: bool) -> None:
        self.tokenizer = tokenizer
        self.samples_per_epoch = order.samples_per_epoch
        self._order, self._data, self._pin_memory = order, data, pin_memory
        self._progress: Progress = {"position": 0}

    @property
    def position(self) -> int:
        """Samples handed out so far, over all ranks."""
        return self._progress["position"]

    def __iter__(self) -> Iterator[Batch]:
        n_threads = min(self._data.num_workers, self._order.max_threads)
        tasks = (functools.partial(self._finish, task) for task in self._order.tasks(self._progress))
        for batch, progress in _ahead(tasks, n_threads, self._data.prefetch_factor):
            self._progress = progress
            yield batch

    def _finish(self, task: Callable[[], tuple[Batch, Progress]]) -> tuple[Batch, Progress]:
        batch, progress = task()
        return (_pinned(batch) if self._pin_memory else batch), progress

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that was handed out; can be written as JSON."""
        return {"identity": self._order.identity(), "progress": dict(self._progress)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            DataError: it is the state of another dataset, tokenizer, seed or seq_len, or of a stream read by
                another rank or number of ranks. The message names what differs.
        """
        ours, theirs = self._order.identity(), state["identity"]
        different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if different:
            lines = (f"{n} was {theirs.get(n)!r} and is {ours.get(n)!r}" for n in different)
            raise DataError(
                f"the data position of the checkpoint does not fit this run: {'; '.join(lines)}. Restore what differs "
                "to resume, or start a new run from the checkpoint's weights"
            )
        self._progress = dict(state["progress"])


class ValidationLoader:
    """The same batches in each pass; over all ranks they hold every target of the documents once.

    Every rank has the same number of batches: where the text runs out, samples are ignored targets.

    Attributes:
        n_batches: batches of a pass, on each rank.
        tokenizer: None for the synthetic dataset.
    """

    def __init__(
        self, row: DocumentRow, tokenizer: Tokenizer | None, layout: BatchLayout, share: Share, steps: int
    ) -> None:
        self.tokenizer = tokenizer
        self._row, self._layout, self._share = row, layout, share
        n_windows = -(-(row.n_tokens - 1) // layout.seq_len)
        if n_windows < 1:
            raise DataError(
                f"the validation text has {row.n_tokens} tokens; it needs at least 2. A single document cannot be "
                "split: set validation.dataset_path, or validation.no_enable"
            )
        n_batches = -(-n_windows // share.samples_per_microbatch)
        self.n_batches = n_batches if steps < 0 else min(steps, n_batches)

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Batch]:
        n, length = self._share.local_batch_size, self._layout.seq_len
        for step in range(self.n_batches):
            first = step * self._share.samples_per_microbatch + self._share.dp_rank * n
            begins = range(first * length, (first + n) * length, length)
            yield self._layout.assemble([self._row.read(begin, begin + length + 1) for begin in begins])


@dataclass(frozen=True, kw_only=True)
class ValidationText:
    """What to validate on; "" is training's. ``steps``: batches of a pass, -1 until the text ends."""

    dataset: str = ""
    dataset_path: str = ""
    seq_len: int
    local_batch_size: int
    steps: int = -1


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
    pin_memory: bool = False,
) -> tuple[TrainLoader, ValidationLoader | None]:
    """Loaders of one rank for training and validation (None: no validation).

    Validation on training's own text holds whole documents out of training; on other text it takes all of it, and
    nothing is held out.

    Raises:
        DataError, ConfigError: unusable data, tokenizer or settings, naming the file or key.
    """
    own = (dataset, dataset_path)
    if validation is not None:
        own = (validation.dataset or dataset, validation.dataset_path or dataset_path)
    holdout = own == (dataset, dataset_path)
    text = OpenText(data, dataset, dataset_path, vocab_size)
    train_loader = build_train_loader(
        data,
        dataset=dataset,
        dataset_path=dataset_path,
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        vocab_size=vocab_size,
        holdout=holdout,
        pin_memory=pin_memory,
        text=text,
    )
    if validation is None:
        return train_loader, None
    validation_loader = build_validation_loader(
        data,
        dataset=own[0],
        dataset_path=own[1],
        seq_len=validation.seq_len,
        local_batch_size=validation.local_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        vocab_size=vocab_size,
        steps=validation.steps,
        holdout=holdout,
        text=text if holdout else None,
    )
    return train_loader, validation_loader


class OpenText:
    """A dataset opened once for training and validation: its tokenizer, and a token store or a stream."""

    def __init__(self, data: DataConfig, dataset: str, dataset_path: str, vocab_size: int) -> None:
        if data.streaming and dataset != HUGGINGFACE:
            raise DataError(f"data.streaming = true needs training.dataset = {HUGGINGFACE!r}, not {dataset!r}")
        self.tokenizer = open_tokenizer(data, dataset, vocab_size)
        self.stream = HuggingFace(data, dataset_path, streaming=True) if is_stream(data, dataset) else None
        self._open_store = functools.partial(open_store, data, dataset, dataset_path, self.tokenizer, vocab_size)
        self._n_first = data.holdout_documents

    @functools.cached_property
    def store(self) -> TokenStore:
        """All of a dataset that is no stream, tokenised."""
        return self._open_store()

    @functools.cached_property
    def first_documents(self) -> list[str]:
        """The first data.holdout_documents documents of a stream."""
        assert self.stream is not None
        return first_documents(self.stream, self._n_first)


def build_train_loader(
    data: DataConfig,
    *,
    dataset: str,
    dataset_path: str,
    seq_len: int,
    local_batch_size: int,
    dp_rank: int,
    dp_size: int,
    vocab_size: int,
    holdout: bool = True,
    pin_memory: bool = False,
    text: OpenText | None = None,
) -> TrainLoader:
    """Training batches of one rank.

    Args:
        dataset: one of ``DATASET_NAMES``; dataset_path: what it reads (see ``sources``).
        vocab_size: tokens that the model has room for; the synthetic dataset uses all of them.
        holdout: leave ``data.holdout_documents`` documents out, for validation. False if validation has a
            dataset of its own.
        text: the dataset, where it is open already.
    Raises:
        DataError, ConfigError: unusable data, tokenizer or settings, naming the file or key.
    """
    share = Share(local_batch_size=local_batch_size, dp_rank=dp_rank, dp_size=dp_size)
    text = text or OpenText(data, dataset, dataset_path, vocab_size)
    layout = _layout(data, seq_len)
    if text.stream is not None:
        order: _Order = _stream_order(data, text, layout, share, holdout)
    else:
        store = text.store
        documents, held_out = split_documents(store.n_documents, data.holdout_documents if holdout else 0)
        epochs = Epochs(store, documents, seq_len=seq_len, seed=data.seed, shuffle=data.shuffle)
        logger.info(
            "data: an epoch is %s samples of %d tokens; %d of %d documents are held out for validation",
            f"{epochs.n_windows:,}",
            seq_len,
            len(held_out),
            store.n_documents,
        )
        order = _IndexedOrder(epochs, layout, share)
    return TrainLoader(order, text.tokenizer, data, pin_memory=pin_memory)


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
    text: OpenText | None = None,
) -> ValidationLoader:
    """Validation batches of one rank.

    Args:
        holdout: True: the documents that ``build_train_loader`` leaves out of this dataset. False: all of it,
            or of a stream its first ``data.holdout_documents`` documents.
        steps: batches of a pass (-1, or more than there are: until the text ends).
        text: the dataset, where it is open already.
    Raises:
        DataError, ConfigError: as for ``build_train_loader``; nothing to validate on.
    """
    share = Share(local_batch_size=local_batch_size, dp_rank=dp_rank, dp_size=dp_size)
    if data.holdout_documents == 0 and (holdout or is_stream(data, dataset)):
        raise DataError(
            "there is nothing to validate on: data.holdout_documents = 0 and validation has no dataset that ends; "
            "raise data.holdout_documents or set validation.dataset and validation.dataset_path"
        )
    text = text or OpenText(data, dataset, dataset_path, vocab_size)
    if text.stream is not None:
        assert text.tokenizer is not None  # only synthetic has none
        store = store_of_texts(text.first_documents, text.tokenizer)
    else:
        store = text.store
    documents = np.arange(store.n_documents)
    if holdout and text.stream is None:
        documents = split_documents(store.n_documents, data.holdout_documents)[1]
    row = DocumentRow(store, documents)
    logger.info("data: validation text: %d documents, %s tokens", len(documents), f"{row.n_tokens:,}")
    return ValidationLoader(row, text.tokenizer, _layout(data, seq_len), share, steps)


def _layout(data: DataConfig, seq_len: int) -> BatchLayout:
    return BatchLayout(
        seq_len=seq_len,
        document_mask=data.document_mask,
        max_documents_per_sample=data.max_documents_per_sample,
    )


def _stream_order(data: DataConfig, text: OpenText, layout: BatchLayout, share: Share, holdout: bool) -> _StreamOrder:
    stream, tokenizer = text.stream, text.tokenizer
    assert stream is not None and tokenizer is not None  # only synthetic has no tokenizer
    reader = DocumentReader(
        stream,
        dp_rank=share.dp_rank,
        dp_size=share.dp_size,
        seed=data.seed,
        shuffle=data.shuffle,
        held_out=frozenset(map(text_hash, text.first_documents if holdout else [])),
    )
    logger.info(
        "data: streaming %s: each rank reads 1/%d of its %d shards and takes 1 in %d of their documents",
        stream.description,
        reader.n_groups,
        stream.n_shards,
        reader.group_size,
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
        "data.holdout_documents": data.holdout_documents if holdout else 0,
        "data.seed": data.seed,
        "data.shuffle": data.shuffle,
        "data.shuffle_buffer": data.shuffle_buffer,
        "training.seq_len": layout.seq_len,
        "data-parallel degree": share.dp_size,
        "data-parallel rank": share.dp_rank,
    }
    return _StreamOrder(packer, identity, layout, share)


def _ahead(tasks: Iterator[Callable[[], T]], n_threads: int, prefetch_factor: int) -> Iterator[T]:
    """Results of ``tasks`` in order; each of ``n_threads`` threads keeps ``prefetch_factor`` ready (0: made here)."""
    if n_threads == 0:
        for task in tasks:
            yield task()
        return
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="data")
    try:
        pending: deque[Future[T]] = deque()
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > n_threads * prefetch_factor:
                yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pinned(batch: Batch) -> Batch:
    pinned: list[Any] = [None if tensor is None else tensor.pin_memory() for tensor in batch]
    return Batch(*pinned)
