"""Small models with maps in float8, emulated on CPU, and their gradients; what the tests of float8 share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

pytest.importorskip("torchao", reason="float8 needs torchao")

from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, GDNConfig, MixersConfig
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.float8 import Float8Plan, apply_float8, update_scales
from lt2titan.parallel.fsdp import reshard
from lt2titan.parallel.mesh import ParallelDims
from lt2titan.parallel.parallelize import parallelize

CPU = torch.device("cpu")
EMULATED = {"min_size": 16, "auto_filter": False, "emulate": True}
TENSORWISE = Float8Plan("tensorwise", **EMULATED)
GATHERED = replace(TENSORWISE, all_gather=True)
ROWWISE = Float8Plan("rowwise", **EMULATED)
ROWWISE_GW_HP = Float8Plan("rowwise_with_gw_hp", **EMULATED)
N_MAPS = 2 * 8 + 7  # q, k, v, o and the SwiGLU's three, and in gdn the output gate; not a and b, a number per head


def config(n_loops: int = 3) -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        dim=64,
        n_layers=3,
        n_loops=n_loops,
        ffn_dim=96,
        mixer="gdn",
        hybrid=HybridConfig(mixer="full", ratio=2),
        mixers=MixersConfig(full=FullConfig(n_heads=2), gdn=GDNConfig(n_heads=2)),
    )


def microbatches(n: int = 2) -> list[Tensor]:
    """Of two rows each."""
    return list(torch.randint(0, 64, (2 * n, 33), generator=torch.Generator().manual_seed(0)).split(2))


def build(
    plan: Float8Plan | None,
    n_loops: int = 3,
    *,
    model_config: ModelConfig | None = None,
    replicas: int = 1,
    n_tensor: int = 1,
    compile_backend: Any = "",
    loop_reshard: str = "per_step",
    cpu_offload: bool = False,
) -> LT2:
    """Laid out over all ranks of the process group."""
    model = build_on_meta(model_config or config(n_loops), "reference")
    if plan is not None:
        apply_float8(model, plan, n_tensor)
    degrees = ParallelismConfig(data_parallel_replicate_degree=replicas, tensor_parallel_degree=n_tensor)
    dims = ParallelDims.build(degrees, "cpu")
    parallelize(
        model,
        dims,
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        activation_checkpoint="none",
        compile_backend=compile_backend,
        loop_reshard=loop_reshard,
        cpu_offload=cpu_offload,
    )
    materialise(model, CPU, seed=3, storage=CPU)
    if plan is not None and plan.all_gather:
        update_scales(model, loop_reshard)
    return model


def gradients(model: LT2, batches: list[Tensor]) -> dict[str, Tensor]:
    """Whole gradients by name, and the mean loss of this rank's batches, with those of indexers, as "loss"."""
    total = torch.zeros(())
    for rows in batches:
        loss, auxiliary = model(rows[:, :-1], targets=rows[:, 1:], with_auxiliary=True)
        loss = sum(auxiliary.values(), loss) / (4 * 32)
        loss.backward()
        total += loss.detach()
    reshard(model)
    found: dict[str, Tensor] = {"loss": total}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found
