"""Float8 over two GPUs against one: the same weights, bit for bit, each cast once; gradients as far from fp64, give or
take what scales of parts of rows and channels cost.

pytest tests/gpu/test_float8_cuda.py
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)
pytest.importorskip("torchao", reason="float8 needs torchao")

import torchao.float8.float8_linear
from test_layouts_cuda import N_RANKS, batch, config, loss_and_gradient, own_part, relative
from torch import Tensor
from torchao.float8.float8_training_tensor import Float8TrainingTensor, GemmInputRole

import lt2titan.parallel.float8_linear
from lt2titan.kernels.backend import resolve_backend
from lt2titan.kernels.check.__main__ import limit_tuning
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.shares import local
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.float8 import Float8Plan, apply_float8, update_scales
from lt2titan.parallel.float8_linear import Float8Linear
from lt2titan.parallel.mesh import ParallelDims
from lt2titan.parallel.parallelize import parallelize

pytestmark = pytest.mark.gpu
TENSORWISE = Float8Plan("tensorwise", min_size=16, auto_filter=False, all_gather=True)
SLACK = 2.0

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "fsdp, per visit": {"loop_reshard": "per_visit"},
    "fsdp, compiled": {"compile_backend": "inductor"},
    "fsdp, offloaded": {"cpu_offload": True},
    "tensor": {"n_tensor": 2},
    "tensor, compiled": {"n_tensor": 2, "compile_backend": "inductor"},
    "tensor, offloaded per visit": {"n_tensor": 2, "cpu_offload": True, "loop_reshard": "per_visit"},
}


def split_model(n_tensor: int = 1, loop_reshard: str = "per_step", **options: Any) -> tuple[LT2, ParallelDims]:
    """Over two GPUs, in bf16, its maps in float8."""
    device = torch.device("cuda", dist.get_rank())
    dims = ParallelDims.build(ParallelismConfig(tensor_parallel_degree=n_tensor), "cuda")
    model = build_on_meta(config("full"), resolve_backend("auto", device))
    apply_float8(model, TENSORWISE, n_tensor)
    precision = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    parallelize(model, dims, activation_checkpoint="none", loop_reshard=loop_reshard, **precision, **options)  # type: ignore[arg-type]
    materialise(model, device, seed=0, storage=torch.device("cpu") if options.get("cpu_offload") else device)
    update_scales(model, loop_reshard)
    return model, dims


@contextmanager
def counted_casts() -> Iterator[Counter[str]]:
    """Of weights, when they are gathered and when they are multiplied (of compiled blocks: once per graph)."""
    counts: Counter[str] = Counter()

    def counting(when: str, cast: Any) -> Any:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            is_weight = when == "gathered" or GemmInputRole.WEIGHT in (*args, kwargs.get("gemm_input_role"))
            counts[when] += is_weight
            return cast(tensor, *args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for when, module, name in (
            ("gathered", lt2titan.parallel.float8_linear, "to_fp8_saturated"),
            ("multiplied", torchao.float8.float8_linear, "hp_tensor_to_float8_dynamic"),
        ):
            patch.setattr(module, name, counting(when, getattr(module, name)))
        yield counts


def check(layout: str) -> None:
    device = torch.device("cuda", dist.get_rank())
    whole = batch(is_packed=False)
    split, dims = split_model(**LAYOUTS[layout])
    with counted_casts() as counts:
        loss, gradients = loss_and_gradient(split, own_part(whole, dims), device)
    assert +counts == {"gathered": sum(isinstance(module, Float8Linear) for module in split.modules())}  # of two loops
    dist.all_reduce(loss, group=dims.loss_group)

    one = build_on_meta(config("full"), resolve_backend("auto", device))
    apply_float8(one, Float8Plan("tensorwise", min_size=16, auto_filter=False))
    materialise(one, device, seed=0)
    weights_are_those_of_one_process(split, one)
    one.to(torch.bfloat16)
    exact = build_on_meta(config("full"), "reference")
    exact.load_state_dict({k: v.double() for k, v in one.state_dict().items()}, assign=True)
    _, one_gradients = loss_and_gradient(one, whole, device)
    exact_loss, exact_gradients = loss_and_gradient(exact, whole, device)
    error, yardstick = relative(gradients, exact_gradients), relative(one_gradients, exact_gradients)
    off = abs(float(loss) / float(exact_loss) - 1)
    if dist.get_rank() == 0:
        print(f"float8 {layout}: gradients {error:.1e} (one GPU {yardstick:.1e}), loss {off:.1e}")
    assert error < SLACK * yardstick and off < 1e-2, (layout, error, yardstick, off)


def weights_are_those_of_one_process(split: LT2, one: LT2) -> None:
    """Gathered, a weight is its part of what one scale makes of the whole in fp32."""
    for block, whole in zip(split.core.blocks, one.core.blocks, strict=True):
        block.unshard()  # type: ignore[operator]
        for name in ("up_proj", "down_proj"):
            gathered: Tensor = local(getattr(block.ffn, name).weight)
            assert isinstance(gathered, Float8TrainingTensor)
            w = getattr(whole.ffn, name).weight.detach()
            scale = (448 / w.abs().max().double()).float()
            w = (w * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            parts = w.split(gathered.shape[0], 0) if name == "up_proj" else w.split(gathered.shape[1], 1)
            assert torch.equal(gathered._scale, scale), name
            assert torch.equal(gathered._data.float(), parts[dist.get_rank() % len(parts)]), name
        block.reshard()  # type: ignore[operator]


def _start(rank: int, rendezvous: str, layout: str) -> None:
    torch.cuda.set_device(rank)
    torch.set_num_threads(1)  # many of these run at a time
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{rendezvous}", rank=rank, world_size=N_RANKS)
    limit_tuning(2)
    check(layout)
    dist.barrier()
    os._exit(0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_against_one(layout: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, args=(str(Path(folder) / "rendezvous"), layout), nprocs=N_RANKS)  # type: ignore[no-untyped-call]
