"""From a configuration to a model that lies on its devices."""

from __future__ import annotations

import torch

from lt2titan.config.job import JobConfig
from lt2titan.kernels.backend import resolve_backend
from lt2titan.metrics.hardware import device_memory
from lt2titan.model.flops import count_parameters
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.parallel.float8 import plan_float8
from lt2titan.parallel.fsdp import FSDPPlan, plan_fsdp
from lt2titan.parallel.mesh import ParallelDims
from lt2titan.parallel.parallelize import parallelize


def build_model(config: JobConfig, dims: ParallelDims, device: torch.device) -> tuple[LT2, FSDPPlan]:
    """The model on ``device``, laid out over ``dims``, with its initial values; and how FSDP2 treats its loops."""
    model, plan = lay_out(config, dims, device, device_memory(device))
    storage = torch.device("cpu") if config.parallelism.cpu_offload else device
    materialise(model, device, config.debug.seed, storage)
    return model, plan


def lay_out(config: JobConfig, dims: ParallelDims, device: torch.device, memory: int) -> tuple[LT2, FSDPPlan]:
    """`build_model` without values; ``memory`` is the device's, in bytes."""
    backend = resolve_backend(config.kernels.backend, device)
    model = build_on_meta(config.model, backend)
    precision = config.training.mixed_precision_param
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    param_dtype = getattr(torch, precision)
    reduce_dtype = getattr(torch, config.training.mixed_precision_reduce)
    plan = plan_fsdp(
        loop_reshard=config.parallelism.fsdp_loop_reshard,
        defer_reductions=config.parallelism.fsdp_defer_reductions,
        n_parameters=count_parameters(model).total // dims.tensor,
        n_shards=dims.shard * dims.context,
        n_ranks=dims.replicate * dims.shard * dims.context,
        n_microbatches=config.training.microbatches(dims.dp_size)[1],
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        cpu_offload=config.parallelism.cpu_offload,
        device_memory=memory,
    )
    parallelize(
        model,
        dims,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        activation_checkpoint=config.activation_checkpoint.mode,
        compile_backend=config.compile.backend if config.compile.enable else "",
        skip_last_loops=config.activation_checkpoint.skip_last_loops,
        memory_budget=config.activation_checkpoint.memory_budget,
        loop_reshard=plan.loop_reshard,
        cpu_offload=config.parallelism.cpu_offload,
        sequence_parallel=config.parallelism.sequence_parallel,
        context_parallel_attention=config.parallelism.context_parallel_attention,
        float8=plan_float8(
            config.float8,
            device=device,
            compiled=config.compile.enable,
            n_tensor=dims.tensor,
            cpu_offload=config.parallelism.cpu_offload,
            n_tokens=config.training.microbatches(dims.dp_size)[0] * config.training.seq_len // dims.context,
        ),
    )
    return model, plan
