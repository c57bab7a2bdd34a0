"""Two sharded processes against one whole model: values, gradients, and how often parameters travel."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, GDNConfig, MixersConfig
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.fsdp import reshard
from lt2titan.parallel.mesh import ParallelDims
from lt2titan.parallel.parallelize import parallelize
from lt2titan.trainer import clip_grad_norm

CPU = torch.device("cpu")
N_LAYERS = 3


def config(n_loops: int = 4) -> ModelConfig:
    # Three rows of rho and odd widths: shards of unequal and of no size.
    return ModelConfig(
        vocab_size=37,
        dim=16,
        n_layers=N_LAYERS,
        n_loops=n_loops,
        ffn_dim=20,
        mixer="gdn",
        hybrid=HybridConfig(mixer="full", ratio=2),
        mixers=MixersConfig(full=FullConfig(n_heads=2), gdn=GDNConfig(n_heads=2)),
    )


def batch() -> torch.Tensor:
    return torch.randint(0, 37, (4, 17), generator=torch.Generator().manual_seed(0))


def loss_of(model: LT2, rows: torch.Tensor) -> torch.Tensor:
    return model(rows[:, :-1], targets=rows[:, 1:]) / (4 * 16)


def whole_model(n_loops: int = 4) -> LT2:
    model = build_on_meta(config(n_loops), "reference")
    materialise(model, CPU, seed=3)
    return model


def sharded_model(n_loops: int = 4) -> LT2:
    model = build_on_meta(config(n_loops), "reference")
    dims = ParallelDims.build(ParallelismConfig(), "cpu")
    parallelize(model, dims, param_dtype=torch.float32, reduce_dtype=torch.float32, activation_checkpoint="none")
    materialise(model, CPU, seed=3)
    return model


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collectives(work: Callable[[], None]) -> Counter[str]:
    """How often ``work`` calls each collective. By the profiler: a dispatch mode cannot look inside torch.func.vjp,
    which the reference operators use in their backward pass."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    return Counter(event.name for event in profiler.events() if event.name.startswith("c10d::"))


def same_values_and_gradients(rank: int) -> None:
    sharded, one = sharded_model(), whole_model()
    loss_of(one, batch()).backward()
    expected_norm = clip_grad_norm(one, 0.1)
    loss_of(sharded, batch()[rank * 2 : rank * 2 + 2]).backward()
    reshard(sharded)
    norm = clip_grad_norm(sharded, 0.1)
    torch.testing.assert_close(norm, expected_norm)
    expected = dict(one.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert torch.equal(whole(parameter), expected[name]), name
        torch.testing.assert_close(whole(parameter.grad), expected[name].grad, msg=name)


def gathers_do_not_depend_on_loops_or_accumulation(rank: int) -> None:
    counted = []
    for n_loops, n_microbatches in ((1, 1), (4, 1), (4, 3)):
        model = sharded_model(n_loops)

        def step(model: LT2 = model, n_microbatches: int = n_microbatches) -> None:
            for _ in range(n_microbatches):
                loss_of(model, batch()).backward()
            reshard(model)

        counts = collectives(step)
        gathers = sum(n for name, n in counts.items() if "allgather" in name)
        reductions = sum(n for name, n in counts.items() if "reduce_scatter" in name)
        counted.append((gathers, reductions))
    # One group per block and one for the rest.
    groups = N_LAYERS + 1
    assert counted == [(groups, groups), (groups, groups), (groups, 3 * groups)], counted


def _start(rank: int, rendezvous: str, work: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    work(rank)
    dist.barrier()
    os._exit(0)  # as lt2titan.train leaves: tearing down races with gloo's threads


@pytest.mark.parametrize("work", [same_values_and_gradients, gathers_do_not_depend_on_loops_or_accumulation])
def test_two_ranks(work: Callable[[int], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, args=(str(Path(folder) / "rendezvous"), work), nprocs=2)  # type: ignore[no-untyped-call]
