"""The order of a dataset for one data-parallel rank: its batches after a given progress, as tasks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from lt2titan.data.indexed import Epochs
from lt2titan.data.packing import Batch, BatchLayout
from lt2titan.data.streaming import PackPosition, StreamPacker

Progress = dict[str, int]  # "position" (samples over all ranks) and, for a stream, a PackPosition
Task = Callable[[], tuple[Batch, Progress]]


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
            raise ValueError(f"a local batch of {self.local_batch_size} samples is too small; it needs at least 1")

    @property
    def samples_per_microbatch(self) -> int:
        return self.local_batch_size * self.dp_size


class Order(Protocol):
    """Batches after a given progress, as tasks without end; at most ``max_threads`` may run at a time."""

    max_threads: int

    def identity(self) -> dict[str, Any]:
        """What a progress depends on; one is valid where this is the same."""

    def tasks(self, progress: Progress) -> Iterator[Task]:
        """Each makes a batch and tells the progress after it."""


class IndexedOrder:
    """Batches are functions of the position, so several threads may make them."""

    max_threads = 64

    def __init__(self, epochs: Epochs, layout: BatchLayout, share: Share) -> None:
        self.epochs, self.layout, self.share = epochs, layout, share

    def identity(self) -> dict[str, Any]:
        return self.epochs.identity()

    def tasks(self, progress: Progress) -> Iterator[Task]:
        for position in itertools.count(progress["position"], self.share.samples_per_microbatch):
            yield functools.partial(self._make, position)

    def _make(self, position: int) -> tuple[Batch, Progress]:
        n = self.share.local_batch_size
        first = position + self.share.dp_rank * n
        windows = [self.epochs.sample(index) for index in range(first, first + n)]
        return self.layout.assemble(windows), {"position": position + self.share.samples_per_microbatch}


class StreamOrder:
    """Batches follow from each other, so one thread at a time may make them."""

    max_threads = 1

    def __init__(self, packer: StreamPacker, identity: dict[str, Any], layout: BatchLayout, share: Share) -> None:
        self.packer, self.layout, self.share = packer, layout, share
        self._identity = identity

    def identity(self) -> dict[str, Any]:
        return self._identity

    def tasks(self, progress: Progress) -> Iterator[Task]:
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
