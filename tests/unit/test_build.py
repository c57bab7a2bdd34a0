"""Ranks that could decide differently decide alike."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lt2titan import build
from lt2titan.config.loader import load_config
from lt2titan.parallel.mesh import ParallelDims

TINY = Path(__file__).parents[1] / "assets" / "tiny.toml"


def _start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    config = load_config(TINY, ["--training.local_batch_size", "2"], 2)
    dims = ParallelDims.build(config.parallelism, "cpu")
    found = []
    for memory in ((2**40, 2**40), (2**40, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "device_memory", lambda device, memory=memory: memory[rank])
            _, layout = build.build_model(config, dims, torch.device("cpu"))
        found.append(layout.loop_reshard)
    assert found == ["per_step", "per_visit"], found
    dist.barrier()
    os._exit(0)  # as lt2titan.train leaves: tearing down races with gloo's threads


def test_a_layout_is_planned_by_the_least_memory_of_all_ranks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, args=(folder,), nprocs=2)  # type: ignore[no-untyped-call]
