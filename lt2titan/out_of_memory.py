"""What a run says that does not fit into the memory of its device, or of the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lt2titan.config.job import JobConfig

ADVICE = "lower training.local_batch_size, recompute more (activation_checkpoint.mode), or use more devices"


class DeviceMemoryError(RuntimeError):
    """A device, or the host, ran out of memory."""


@contextmanager
def explained(config: JobConfig, world_size: int) -> Iterator[None]:
    """Around whatever allocates, in each of ``world_size`` processes.

    Raises:
        DeviceMemoryError: in place of torch's error, with what that says first and the settings that matter.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "out of memory" not in text and "DefaultCPUAllocator" not in text:
            raise
        batch_size, _ = config.training.microbatches(config.parallelism.data_parallel_size(world_size))
        raise DeviceMemoryError(
            f"{text.strip()}\n"
            f"The run does not fit: each rank has microbatches of {batch_size} x {config.training.seq_len} tokens "
            "(training.local_batch_size, training.seq_len), and activation_checkpoint.mode = "
            f"{config.activation_checkpoint.mode!r}; {ADVICE}. scripts/estimate.py foresees what a change saves; "
            "snapshots of CUDA memory (profiling.enable_memory_snapshot) show what took it"
        ) from error
