"""From a configuration to a model that lies on its devices."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lt2titan.config.job import JobConfig
from lt2titan.kernels.backend import resolve_backend
from lt2titan.layout_plan import convert_to_float8, plan_layout
from lt2titan.metrics.hardware import device_memory
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.parallel.layout import Layout
from lt2titan.parallel.mesh import ParallelDims
from lt2titan.parallel.parallelize import parallelize


def build_model(config: JobConfig, dims: ParallelDims, device: torch.device) -> tuple[LT2, Layout]:
    """The model on ``device``, laid out over ``dims``, with its initial values; and how it is."""
    # Ranks that planned by memory of their own could choose differently, and wait for each other.
    memory = torch.tensor(device_memory(device), device=device)
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    model, layout = lay_out(config, dims, device, int(memory))
    storage = torch.device("cpu") if config.parallelism.cpu_offload else device
    materialise(model, device, config.debug.seed, storage)
    return model, layout


def lay_out(
    config: JobConfig, dims: ParallelDims, device: torch.device, memory: int, layout: Layout | None = None
) -> tuple[LT2, Layout]:
    """`build_model` without values; ``memory`` is the device's, in bytes, by which a ``layout`` is planned if none is
    given."""
    backend = resolve_backend(config.kernels.backend, device)
    model = build_on_meta(config.model, backend)
    precision = config.training.mixed_precision_param
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    param_dtype = getattr(torch, precision)
    reduce_dtype = getattr(torch, config.training.mixed_precision_reduce)
    convert_to_float8(config, model, dims.world_size, device)
    layout = layout or plan_layout(config, model, dims.world_size, param_dtype, memory)
    parallelize(
        model,
        dims,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        activation_checkpoint=config.activation_checkpoint.mode,
        compile_backend=config.compile.backend if config.compile.enable else "",
        skip_last_loops=config.activation_checkpoint.skip_last_loops,
        memory_budget=config.activation_checkpoint.memory_budget,
        loop_reshard=layout.loop_reshard,
        cpu_offload=config.parallelism.cpu_offload,
        sequence_parallel=config.parallelism.sequence_parallel,
        context_parallel_attention=config.parallelism.context_parallel_attention,
    )
    return model, layout
