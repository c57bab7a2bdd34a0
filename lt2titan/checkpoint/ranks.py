"""Agreement between ranks, so that an error on one is an error on all and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lt2titan.checkpoint.storage import CheckpointError

T = TypeVar("T")


class Ranks:
    """All ranks of the job, or the one process there is.

    Holds a gloo group of its own: checkpoint traffic needs no GPU, and writing many gigabytes to slow storage
    may take longer than the training group's timeout allows.
    """

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))

    def on_all(self, work: Callable[[], T]) -> T:
        """This rank's result of ``work``. Raises CheckpointError on all ranks if it fails on any of them."""
        result: Any = None
        failure: str | None = None
        try:
            result = work()
        except (CheckpointError, OSError, ValueError) as error:
            failure = str(error) or type(error).__name__
        failures: list[str | None] = [failure] * self.size
        if self.size > 1:
            dist.all_gather_object(failures, failure, group=self.group)
        reasons = [f"rank {rank}: {why}" for rank, why in enumerate(failures) if why is not None]
        if reasons:
            raise CheckpointError("; ".join(reasons) if self.size > 1 else str(failure))
        return result

    def on_first(self, work: Callable[[], T]) -> T:
        """Result of ``work``, run on rank 0 only. Raises CheckpointError on all ranks if it fails there."""
        message: list[Any] = [None, None]
        if self.rank == 0:
            try:
                message = [work(), None]
            except (CheckpointError, OSError) as error:
                message = [None, str(error)]
        if self.size > 1:
            dist.broadcast_object_list(message, src=0, group=self.group)
        if message[1] is not None:
            raise CheckpointError(message[1])
        return message[0]
