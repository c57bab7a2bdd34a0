"""Two sharded processes with several microbatches against one whole model: all figures of a loop's view."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lt2titan.data.packing import Batch
from lt2titan.evaluation.loop_diagnostics import validation_diagnostics
from lt2titan.metrics.loop_statistics import LoopStatistics
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, GDNConfig, MixersConfig
from lt2titan.optim.clip import GradNorms, clip_grad_norm
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.fsdp import reshard
from lt2titan.parallel.mesh import ParallelDims
from lt2titan.parallel.parallelize import parallelize

CPU = torch.device("cpu")
N_LOOPS, MAX_NORM = 3, 0.1


# Three rows of rho over two ranks and odd widths: shards of unequal and of no size.
CONFIG = ModelConfig(
    vocab_size=37,
    dim=16,
    n_layers=3,
    n_loops=N_LOOPS,
    ffn_dim=20,
    mixer="gdn",
    hybrid=HybridConfig(mixer="full", ratio=2),
    mixers=MixersConfig(full=FullConfig(n_heads=2), gdn=GDNConfig(n_heads=2)),
    tie_embeddings=False,
)


def model(is_sharded: bool) -> LT2:
    built = build_on_meta(CONFIG, "reference")
    if is_sharded:
        parallelize(
            built,
            ParallelDims.build(ParallelismConfig(), "cpu"),
            param_dtype=torch.float32,
            reduce_dtype=torch.float32,
            activation_checkpoint="block",
        )
    materialise(built, CPU, seed=3)
    # A step of plain descent moves rho away from zero, alike on both.
    loss(built, rows()).backward()
    reshard(built)
    with torch.no_grad():
        for parameter in built.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 / dist.get_world_size() ** is_sharded * parameter.grad
            parameter.grad = None
    return built


def rows() -> torch.Tensor:
    return torch.randint(0, 37, (6, 17), generator=torch.Generator().manual_seed(0))


def loss(built: LT2, tokens: torch.Tensor) -> torch.Tensor:
    return built(tokens[:, :-1], targets=tokens[:, 1:]) / (6 * 16)


def batch(tokens: torch.Tensor) -> Batch:
    """The last of all rows is padding but for its start."""
    targets = tokens[:, 1:].clone()
    targets[(tokens == rows()[-1]).all(dim=1), 5:] = -100
    positions = torch.arange(16).expand(tokens.shape[0], 16)
    return Batch(tokens[:, :-1], targets, positions, None, torch.zeros(()), None)


def step(built: LT2, microbatches: list[torch.Tensor]) -> tuple[LoopStatistics, GradNorms]:
    statistics = LoopStatistics(N_LOOPS, CPU)
    for tokens in microbatches:
        with built.core.observed_by(statistics):
            value = loss(built, tokens)
        value.backward()
    reshard(built)
    return statistics, clip_grad_norm(built, MAX_NORM)


def compare(rank: int) -> None:
    sharded, whole = model(is_sharded=True), model(is_sharded=False)
    mine = list(rows()[rank * 3 : rank * 3 + 3].split(1))  # three microbatches of one row
    statistics, norms = step(sharded, mine)
    figures = statistics.figures()
    expected_statistics, _ = step(whole, [rows()])
    # Both ranks looked at all rows: twice the sums, the same figures.
    expected = expected_statistics.figures()
    assert len(figures) == 3 * N_LOOPS and all(math.isfinite(value) for value in figures.values())
    assert figures["rho/loop_1"] > 0
    assert figures == pytest.approx(expected, rel=1e-4)

    # The truth of the norms is autograd's, on one process and before clipping.
    one = model(is_sharded=False)
    gradients = torch.autograd.grad(loss(one, rows()), list(one.parameters()))
    square = {"core": 0.0, "rest": 0.0}
    for (name, _), gradient in zip(one.named_parameters(), gradients, strict=True):
        outside = name in ("embedding.weight", "norm.weight", "head.weight")
        square["rest" if outside else "core"] += gradient.double().square().sum().item()
    assert norms.core.item() == pytest.approx(math.sqrt(square["core"]), rel=1e-4)
    assert norms.rest.item() == pytest.approx(math.sqrt(square["rest"]), rel=1e-4)
    assert norms.total.item() == pytest.approx(math.sqrt(square["core"] + square["rest"]), rel=1e-4)
    assert norms.total > MAX_NORM

    seen = validation_diagnostics(sharded, [batch(tokens) for tokens in mine], CPU)
    reshard(sharded)
    together = validation_diagnostics(whole, [batch(rows())], CPU)
    assert len(seen) == 2 * N_LOOPS
    assert seen == pytest.approx(together, rel=1e-4)


def test_rho_belongs_to_the_core() -> None:
    """Set by hand, since rho's share in a real gradient is small."""
    gradients = {"core.rho": 3.0, "core.blocks.1.ffn_norm.weight": 4.0, "embedding.weight": 8.0, "norm.weight": 1.0}
    gradients["head.weight"] = 4.0
    built = build_on_meta(CONFIG, "reference")
    materialise(built, CPU, seed=3)
    for name, parameter in built.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.view(-1)[0] = gradients.get(name, 0.0)
    norms = clip_grad_norm(built, 1.0)
    assert [norm.item() for norm in norms] == pytest.approx([math.sqrt(25 + 81), 5.0, 9.0, 0.0])


def _start(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    compare(rank)
    dist.barrier()
    os._exit(0)  # as lt2titan.train leaves: tearing down races with gloo's threads


def test_two_ranks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, args=(str(Path(folder) / "rendezvous"),), nprocs=2)  # type: ignore[no-untyped-call]
