"""A layout tried out without its machines: ``comm.mode = fake_backend``.

One process on a CPU takes the place of rank 0. The model is laid out over a process group that pretends, and one
optimizer step runs on tensors that have a shape but no memory: what cannot be built, sharded or composed fails here
as it would on the first of 512 GPUs. Then the sizes are printed.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from lt2titan.build import lay_out
from lt2titan.config.job import JobConfig
from lt2titan.layout_plan import convert_to_float8, core_of, estimate_memory, plan_layout
from lt2titan.model.init import build_on_meta
from lt2titan.optim.clip import clip_grad_norm
from lt2titan.optim.optimizer import build_optimizer
from lt2titan.parallel.distributed import fake_process_group
from lt2titan.parallel.fake_blocks import first_share
from lt2titan.parallel.float8 import update_scales
from lt2titan.parallel.fsdp import reshard, set_gradient_sync
from lt2titan.parallel.mesh import ParallelDims

logger = logging.getLogger("lt2titan")

CPU = torch.device("cpu")

MEANINGS = {
    "parameters": "of the model, tied weights once",
    "parameters per rank": "of them on rank 0",
    "weights": "fp32 master weights",
    "weights in float8": "shards kept so beside them, where they are gathered several times per step",
    "gradients": "fp32, reduced",
    "optimizer state": "AdamW's moments",
    "gathered parameters": "at the most, by fsdp_loop_reshard",
    "whole gradients": "at the most, before they are reduced, or while reductions are deferred",
    "activations kept": "of the core, for the backward pass of one microbatch",
    "activations in backward": "at the most, what is computed again included",
    "peak": "of a step",
}

ESTIMATED = (
    "weights in float8",
    "gathered parameters",
    "whole gradients",
    "activations kept",
    "activations in backward",
    "peak",
)
"""As by `scripts/estimate.py`; the rest are sizes of what the step has made."""


def dry_run(config: JobConfig) -> dict[str, int]:
    """Build, lay out and step on shapes; rank 0, which has the largest shards, in numbers of parameters and bytes.

    Sizes are those of a GPU run: bfloat16 compute unless training.mixed_precision_param says otherwise. The step's own
    rows are dense, whatever data.document_mask says. Needs an initialised process group, see
    `distributed.fake_process_group`.
    """
    if config.training.mixed_precision_param == "auto":
        config = replace(config, training=replace(config.training, mixed_precision_param="bfloat16"))
    asked = config
    config = replace(config, kernels=replace(config.kernels, backend="reference"))
    if config.parallelism.context_parallel_attention == "ring":
        logger.info("dry run: attention gathers keys, which takes more memory than a ring of them")
        config = replace(config, parallelism=replace(config.parallelism, context_parallel_attention="gather"))
    if config.compile.enable:
        logger.info("dry run: the step itself is eager; its memory is estimated as compiled")
    if config.data.document_mask:
        logger.info("dry run: rows of the step itself are dense; its memory is estimated of packed ones")
    if config.float8.recipe != "none":
        logger.info("dry run: products in float8 are emulated")
        config = replace(config, float8=replace(config.float8, emulate=True))
    dtype = getattr(torch, config.training.mixed_precision_param)
    dims = ParallelDims.build(config.parallelism, "cpu")
    n_rows, _ = config.training.microbatches(dims.dp_size)
    # Planned and estimated is what was asked for, as on a GPU; the step stands in for it.
    whole = build_on_meta(config.model, "reference" if asked.kernels.backend == "reference" else "fla")
    convert_to_float8(asked, whole, dims.world_size)
    memory = int(config.comm.device_memory_gib * 2**30)
    layout = plan_layout(asked, whole, dims.world_size, dtype, memory)
    model, _ = lay_out(config, dims, CPU, memory, layout)
    eager = torch.compiler.set_stance("force_eager")
    with eager, FakeTensorMode(allow_non_fake_inputs=True):  # such as the parameters on meta
        model.to_empty(device=CPU)
        if config.float8.recipe == "tensorwise":
            update_scales(model, layout.loop_reshard)
        weights = [_local(parameter) for parameter in model.parameters()]
        optimizer = build_optimizer(model, config.optimizer)
        tokens = torch.zeros(n_rows, config.training.seq_len // dims.context, dtype=torch.int64)
        for is_last in (False, True) if layout.defers_reductions else (True,):
            set_gradient_sync(model, is_last)
            _objective(*model(tokens, targets=tokens, with_auxiliary=True)).backward()
        reshard(model)
        clip_grad_norm(model, config.training.max_norm)
        gradients = [_local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
        moments = [_local(value) for state in optimizer.state.values() for value in state.values()]
    share = first_share(whole, layout)
    core = core_of(asked, share, layout, dtype, asked.compile.enable)
    estimated = estimate_memory(asked, share, layout, core, dtype, asked.compile.enable)
    return {
        "parameters": sum(p.numel() for p in whole.parameters()),
        "parameters per rank": sum(w.numel() for w in weights),
        "weights": _n_bytes(weights),
        "gradients": _n_bytes(gradients),
        "optimizer state": _n_bytes(moments),
    } | {name: estimated[name] for name in ESTIMATED}


def _objective(loss: Tensor, auxiliary: dict[str, Tensor]) -> Tensor:
    """The cross-entropy with the layers' own losses."""
    return sum(auxiliary.values(), loss)


def show_dry_run(config: JobConfig, world_size: int) -> None:
    """Print what `dry_run` finds for ``world_size`` processes."""
    with fake_process_group(world_size):
        sizes = dry_run(config)
    table = Table("rank 0", "value", "meaning", title=f"dry run: {world_size} processes, one step on shapes")
    for name, value in sizes.items():
        if name.startswith("parameters"):
            table.add_row(name, f"{value:,}", MEANINGS[name])
            continue
        is_on_host = config.parallelism.cpu_offload and name in ("weights", "gradients", "optimizer state")
        beside = ", in host memory" if is_on_host else ""
        if name == "peak":
            beside = f", of {config.comm.device_memory_gib:g} GiB (comm.device_memory_gib), without temporary tensors"
        table.add_row(name, _gib(value), MEANINGS[name] + beside)
    Console().print(table)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.3f} GiB"


def _n_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
