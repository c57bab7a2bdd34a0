"""Batches for training, prepared ahead by threads, with a state that resumes exactly."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from lt2titan.data.errors import DataError
from lt2titan.data.orders import Order, Progress, Task
from lt2titan.data.packing import Batch

T = TypeVar("T")


class TrainLoader:
    """Batches of one data-parallel rank, without end.

    ``iter()`` goes on after the last batch that was handed out (batches prepared ahead do not count) or from
    where ``load_state_dict`` says; take a new iterator after loading.

    Args:
        num_workers, prefetch_factor: of the data section.
    """

    def __init__(self, order: Order, *, num_workers: int, prefetch_factor: int, pin_memory: bool) -> None:
        self._order, self._pin_memory = order, pin_memory
        self._n_threads, self._prefetch_factor = min(num_workers, order.max_threads), prefetch_factor
        self._progress: Progress = {"position": 0}

    def __iter__(self) -> Iterator[Batch]:
        tasks = (functools.partial(self._finish, task) for task in self._order.tasks(self._progress))
        for batch, progress in _ahead(tasks, self._n_threads, self._prefetch_factor):
            self._progress = progress
            yield batch

    def _finish(self, task: Task) -> tuple[Batch, Progress]:
        batch, progress = task()
        return (batch.pinned() if self._pin_memory else batch), progress

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
