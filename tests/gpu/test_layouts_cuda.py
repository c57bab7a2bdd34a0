"""Layouts over two GPUs in bf16 against the same model on one: as far from fp64, give or take what bf16 costs.

pytest tests/gpu/test_layouts_cuda.py
"""

from __future__ import annotations

import os
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

from lt2titan.data.device import model_inputs
from lt2titan.data.packing import Batch
from lt2titan.kernels.backend import resolve_backend
from lt2titan.kernels.check.__main__ import limit_tuning
from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import DSAConfig, FullConfig, MixersConfig, WindowConfig
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.fsdp import reshard
from lt2titan.parallel.mesh import ParallelDims
from lt2titan.parallel.parallelize import parallelize

pytestmark = pytest.mark.gpu
N_RANKS, LENGTH = 2, 256
SLACK = 2.0

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "hsdp": {"data_parallel_replicate_degree": 2},
    "tensor": {"tensor_parallel_degree": 2},
    "context": {"context_parallel_degree": 2},
    "ring": {"context_parallel_degree": 2, "context_parallel_attention": "ring"},
}


def config(mixer: str) -> ModelConfig:
    """The mixer and full attention in turns, two heads each, as wide as the 1.3B model's."""
    mixers = MixersConfig(
        full=FullConfig(n_heads=2), window=WindowConfig(n_heads=2, window=33), dsa=DSAConfig(n_kv_heads=2, top_k=64)
    )
    for sizes in (getattr(mixers, name) for name in MixersConfig.names()):
        if hasattr(sizes, "n_heads"):
            sizes.n_heads = 2
    hybrid = HybridConfig(mixer="" if mixer == "full" else "full", ratio=1)
    return ModelConfig(vocab_size=512, dim=256, n_layers=2, n_loops=2, mixer=mixer, hybrid=hybrid, mixers=mixers)


def batch(is_packed: bool) -> Batch:
    tokens = torch.randint(0, 512, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    positions, cu_seqlens, chunks = torch.arange(LENGTH).expand(2, LENGTH), None, None
    if is_packed:
        lengths = [1, 69, 50, 136, 256, 0]  # of which some are cut in the middle of a row
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in lengths]).view(2, LENGTH)
        chunks = make_chunk_indices(cu_seqlens)
    return Batch(tokens, tokens.roll(-1, 1), positions, cu_seqlens, torch.tensor(1.0), chunks)


def own_part(whole: Batch, dims: ParallelDims) -> Batch:
    if dims.context > 1:
        return whole.stretch(dims.context_rank, dims.context)
    if dims.dp_size == 1:
        return whole
    row = slice(dims.dp_rank, dims.dp_rank + 1)
    return Batch(whole.tokens[row], whole.targets[row], whole.positions[row], None, whole.n_bytes, None)


def loss_and_gradient(model: LT2, part: Batch, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    nats, auxiliary = model(**model_inputs(part, device), with_auxiliary=True)
    loss = nats / (2 * LENGTH)
    sum((kl / (2 * LENGTH) for kl in auxiliary.values()), loss).backward()
    reshard(model)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return loss.detach(), {name: g.double().cpu() for name, g in whole.items()}


def relative(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Of all gradients together: those of a few numbers are luckier or unluckier than those of matrices."""
    difference = sum(float((got[name] - g).norm() ** 2) for name, g in exact.items())
    return float((difference / sum(float(g.norm() ** 2) for g in exact.values())) ** 0.5)


def check(mixer: str, layout: str, is_packed: bool) -> None:
    device = torch.device("cuda", dist.get_rank())
    dims = ParallelDims.build(ParallelismConfig(**LAYOUTS[layout]), "cuda")
    split, one = (build_on_meta(config(mixer), resolve_backend("auto", device)) for _ in range(2))
    precision = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    attention = LAYOUTS[layout].get("context_parallel_attention", "gather")
    parallelize(split, dims, activation_checkpoint="none", context_parallel_attention=attention, **precision)  # type: ignore[arg-type]
    for model in (split, one):
        materialise(model, device, seed=0)
    one.to(torch.bfloat16)
    exact = build_on_meta(config(mixer), "reference")
    exact.load_state_dict({k: v.double() for k, v in one.state_dict().items()}, assign=True)
    whole = batch(is_packed)
    loss, gradients = loss_and_gradient(split, own_part(whole, dims), device)
    dist.all_reduce(loss, group=dims.loss_group)
    _, one_gradients = loss_and_gradient(one, whole, device)
    exact_loss, exact_gradients = loss_and_gradient(exact, whole, device)
    error, yardstick = relative(gradients, exact_gradients), relative(one_gradients, exact_gradients)
    off = abs(float(loss) / float(exact_loss) - 1)
    if dist.get_rank() == 0:
        print(f"{layout} {mixer} packed={is_packed}: gradients {error:.1e} (one GPU {yardstick:.1e}), loss {off:.1e}")
    assert error < SLACK * yardstick + 1e-3 and off < 1e-3, (mixer, layout, is_packed, error, yardstick, off)


def _start(rank: int, rendezvous: str, layout: str, mixer: str) -> None:
    torch.cuda.set_device(rank)
    torch.set_num_threads(1)  # many of these run at a time
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{rendezvous}", rank=rank, world_size=N_RANKS)
    limit_tuning(2)
    check(mixer, layout, is_packed=False)
    if layout in ("tensor", "context"):
        check(mixer, layout, is_packed=True)
    dist.barrier()
    os._exit(0)


CASES = [
    *((layout, "gdn") for layout in ("fsdp", "hsdp", "ring")),
    ("ring", "full"),
    *(("tensor", mixer) for mixer in MixersConfig.names()),
    *(("context", mixer) for mixer in MixersConfig.names()),
]


@pytest.mark.parametrize(("layout", "mixer"), CASES)
def test_two_gpus_against_one(layout: str, mixer: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, args=(str(Path(folder) / "rendezvous"), layout, mixer), nprocs=N_RANKS)  # type: ignore[no-untyped-call]
