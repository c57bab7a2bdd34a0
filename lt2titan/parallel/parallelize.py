"""The composition: how a model on ``meta`` is laid out over devices."""

from __future__ import annotations

import torch

from lt2titan.model.lt2 import LT2
from lt2titan.parallel.activation_checkpoint import apply_activation_checkpoint
from lt2titan.parallel.compile import apply_compile
from lt2titan.parallel.context_parallel import apply_context_parallel
from lt2titan.parallel.fsdp import apply_fsdp
from lt2titan.parallel.mesh import ParallelDims
from lt2titan.parallel.tensor_parallel import apply_tensor_parallel


def parallelize(
    model: LT2,
    dims: ParallelDims,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    activation_checkpoint: str,
    skip_last_loops: int = 0,
    memory_budget: float = 0.5,
    compile_backend: str = "",
    loop_reshard: str = "per_step",
    cpu_offload: bool = False,
    sequence_parallel: bool = True,
    context_parallel_attention: str = "gather",
) -> None:
    """Lay ``model`` out in place, in an order that matters: float8 (`apply_float8`) before all of it, because it
    exchanges modules; tensor parallelism while parameters are plain; context parallelism, which touches no parameter,
    with it, as both change what a block exchanges; checkpointing before FSDP, so that what is recomputed runs inside
    the module that FSDP keeps gathered; compilation after checkpointing, which graphs may contain, and before FSDP,
    whose collectives stay outside of graphs."""
    if dims.tensor > 1:
        apply_tensor_parallel(model, dims.mesh["tensor"], sequence_parallel)
    if dims.context_mesh is not None:
        apply_context_parallel(model, dims.context_mesh, context_parallel_attention, param_dtype)
    apply_activation_checkpoint(
        model,
        activation_checkpoint,
        skip_last_loops=skip_last_loops,
        memory_budget=memory_budget,
        is_compiled=bool(compile_backend),
    )
    if compile_backend:
        apply_compile(model, compile_backend)
    apply_fsdp(model, dims.fsdp_mesh, param_dtype, reduce_dtype, loop_reshard, cpu_offload)
