"""What a run that does not fit into its device's memory says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lt2titan.config.job import JobConfig

ADVICE = "lower training.local_batch_size, recompute more (activation_checkpoint.mode), or use more devices"


class DeviceMemoryError(RuntimeError):
    """A device ran out of memory."""


@contextmanager
def explained(config: JobConfig, world_size: int) -> Iterator[None]:
    """Around whatever allocates on a device, of ``world_size`` processes.

    Raises:
        DeviceMemoryError: in place of torch's error, with what that says first and the settings that matter.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        what, _, _ = str(error).partition(" Including non-PyTorch memory")
        batch_size, _ = config.training.microbatches(config.parallelism.data_parallel_size(world_size))
        mode = config.activation_checkpoint.mode
        raise DeviceMemoryError(
            f"{what.rstrip('.')}. Microbatches of {batch_size} x {config.training.seq_len} tokens on each rank "
            f"(training.local_batch_size, seq_len) do not fit with activation_checkpoint.mode = {mode!r}: {ADVICE}. "
            "scripts/estimate.py foresees what a change saves; snapshots of CUDA memory "
            "(profiling.enable_memory_snapshot) show what took it"
        ) from error
