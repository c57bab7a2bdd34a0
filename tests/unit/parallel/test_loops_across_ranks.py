"""Fewer and truncated loops, and validation after some of them, on two ranks against one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lt2titan.data.packing import Batch
from lt2titan.evaluation.validate import evaluate
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, GDNConfig, MixersConfig
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.fsdp import reshard
from lt2titan.parallel.mesh import ParallelDims
from lt2titan.parallel.parallelize import parallelize

CPU = torch.device("cpu")
N_ROWS, LENGTH = 4, 12
LOOPS = [(3, 0), (2, 0), (3, 1), (1, 0), (3, 2), (2, 1)]
"""(loops, backward loops) of successive steps."""


def model(is_tied: bool, loop_reshard: str = "", recompute: str = "none") -> LT2:
    """Sharded if ``loop_reshard`` says how."""
    config = ModelConfig(
        vocab_size=37,
        dim=16,
        n_layers=3,
        n_loops=3,
        ffn_dim=20,
        mixer="gdn",
        hybrid=HybridConfig(mixer="full", ratio=2),
        mixers=MixersConfig(full=FullConfig(n_heads=2), gdn=GDNConfig(n_heads=2)),
        tie_embeddings=is_tied,
    )
    built = build_on_meta(config, "reference")
    if loop_reshard:
        parallelize(
            built,
            ParallelDims.build(ParallelismConfig(), "cpu"),
            param_dtype=torch.float32,
            reduce_dtype=torch.float32,
            activation_checkpoint=recompute,
            loop_reshard=loop_reshard,
        )
    materialise(built, CPU, seed=3)
    return built


def rows(step: int) -> torch.Tensor:
    return torch.randint(0, 37, (N_ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def gradients(built: LT2, tokens: torch.Tensor, loops: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Of one step; a parameter that no gradient reaches is left out."""
    n_loops, n_backward_loops = loops
    loss = built(tokens[:, :-1], targets=tokens[:, 1:], n_loops=n_loops, n_backward_loops=n_backward_loops)
    (loss / (N_ROWS * LENGTH)).backward()
    reshard(built)
    found = {}
    for name, parameter in built.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            parameter.grad = None
    return found


def batch(tokens: torch.Tensor) -> Batch:
    positions = torch.arange(LENGTH).expand(tokens.shape[0], LENGTH)
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, None, torch.zeros(()), None)


def compare(rank: int) -> None:
    for is_tied, loop_reshard, recompute in (
        (True, "per_step", "none"),
        (False, "per_step", "block"),
        (False, "per_pass", "none"),
        (False, "per_visit", "none"),
        (True, "per_visit", "block"),
    ):
        sharded, whole = model(is_tied, loop_reshard, recompute), model(is_tied)
        for step, loops in enumerate(LOOPS):
            mine = gradients(sharded, rows(step).chunk(2)[rank], loops)
            truth = gradients(whole, rows(step), loops)
            # Where truncation cuts an untied embedding off, there is no gradient rather than zeros.
            assert (
                mine.keys()
                == truth.keys()
                == {name for name, _ in whole.named_parameters()}
                - (set() if is_tied or not loops[1] else {"embedding.weight"})
            )
            for name, expected in truth.items():
                error = torch.linalg.vector_norm(mine[name] - expected) / torch.linalg.vector_norm(expected)
                assert error < 1e-4, (loop_reshard, loops, name, error)
        seen = evaluate(sharded, [batch(rows(9).chunk(2)[rank])], CPU, loops=[1, 2])
        reshard(sharded)
        # Both ranks look at all rows: twice the sums, the same means.
        alone = evaluate(whole, [batch(rows(9))], CPU, loops=[1, 2])
        assert seen.loss_at == pytest.approx(alone.loss_at, rel=1e-5)


def _start(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    compare(rank)
    dist.barrier()
    os._exit(0)  # as lt2titan.train leaves: tearing down races with gloo's threads


def test_two_ranks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, args=(str(Path(folder) / "rendezvous"),), nprocs=2)  # type: ignore[no-untyped-call]
