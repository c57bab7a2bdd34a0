"""Starting and ending the process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that torchrun started and yield this one's device; leave at the end, but not after an error:
    other ranks may be waiting in a collective, and leaving would wait for them.

    Raises:
        RuntimeError: not started by torchrun.
    """
    if "RANK" not in os.environ:
        raise RuntimeError("start training with ./run_train.sh, or python -m torch.distributed.run -m lt2titan.train")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # gloo beside nccl: checkpoints exchange their plans on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    yield device
    dist.destroy_process_group()


@contextmanager
def fake_process_group(world_size: int) -> Iterator[None]:
    """Be rank 0 of ``world_size`` processes that are not there: collectives return at once, with no one's data."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
