"""Parameters in host memory: steps as with parameters on the GPU, and none by a loss that is not finite.

pytest tests/gpu/test_offload_cuda.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, MixersConfig
from lt2titan.optim.clip import clip_grad_norm
from lt2titan.optim.config import OptimizerConfig
from lt2titan.optim.guard import NonFiniteGuard
from lt2titan.optim.optimizer import build_optimizer
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.fsdp import reshard
from lt2titan.parallel.mesh import ParallelDims
from lt2titan.parallel.parallelize import parallelize

pytestmark = pytest.mark.gpu
CPU, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
BUSY = 200_000_000
"""GPU cycles, some 0.1 s: what decides about a step arrives long after the host could have gone on."""


def build(cpu_offload: bool) -> LT2:
    mixers = MixersConfig(full=FullConfig(n_heads=2))
    config = ModelConfig(
        vocab_size=64, dim=32, n_layers=2, n_loops=2, mixer="full", hybrid=HybridConfig(), mixers=mixers
    )
    model = build_on_meta(config, "reference")
    dims = ParallelDims.build(ParallelismConfig(), DEVICE.type)
    precision = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    parallelize(model, dims, activation_checkpoint="none", cpu_offload=cpu_offload, **precision)  # type: ignore[arg-type]
    materialise(model, DEVICE, seed=0, storage=CPU if cpu_offload else DEVICE)
    return model


def values(model: LT2) -> list[torch.Tensor]:
    return [parameter.full_tensor().detach().to(CPU, copy=True) for parameter in model.parameters()]  # type: ignore[operator]


def train(cpu_offload: bool) -> list[list[torch.Tensor]]:
    """Parameters before and after eight steps, of which every second has a loss that is not finite."""
    model = build(cpu_offload)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
    guard = NonFiniteGuard(5, DEVICE)
    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = [values(model)]
    for step in range(8):
        loss = model(tokens, targets=tokens) / tokens.numel()
        loss.backward()
        reshard(model)
        norms = clip_grad_norm(model, 1.0)
        if DEVICE.type == "cuda":
            torch.cuda._sleep(BUSY)
        guard.step(optimizer, loss.detach() * (torch.nan if step % 2 else 1.0), norms.total)
        optimizer.zero_grad()
        found.append(values(model))
    assert guard.counts() == (4, 1)
    return found


def check() -> None:
    offloaded, expected = train(True), train(False)
    for i, (ours, theirs) in enumerate(zip(offloaded, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        if i:
            is_still = all(torch.equal(a, b) for a, b in zip(ours, offloaded[i - 1], strict=True))
            assert is_still == (i % 2 == 0), i


def _start(_: int, rendezvous: str) -> None:
    backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=0, world_size=1)
    check()
    os._exit(0)


def test_offloaded_steps() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, args=(str(Path(folder) / "rendezvous"),), nprocs=1)  # type: ignore[no-untyped-call]
