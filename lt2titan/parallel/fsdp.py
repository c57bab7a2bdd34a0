"""Fully sharded data parallelism (FSDP2) for a stack that is visited several times.

Every block is a group that is gathered and reduced by itself; embedding, norm, rho and head (which may be tied) are one
more, the root. How long a block stays gathered (``parallelism.fsdp_loop_reshard``), with L blocks, T loops and m
microbatches per optimizer step:

    per_step   until `reshard` after the last backward pass: L + 1 all-gathers per step, whatever T and m.
    per_pass   through all loops of a pass: freed when the core's forward pass ends, so that the head and the start of
               the backward pass, where most activations are alive, have that memory; gathered again for the backward
               pass and kept from there through the next microbatch's forward pass. L (m + 1) + 1 all-gathers.
    per_visit  through one visit of the block, forward or backward (torchtitan's reshard_after_forward = True): about
               2 L T m all-gathers.

Autograd adds up what the T visits give to a gradient, so it is reduced once per backward pass, not T times: L + 1
reduce-scatters per microbatch, or at most 2 (L + 1) per step when they are deferred to the last one (a block that is
visited several times is then reduced twice: what earlier microbatches left, and the last one's share). The whole
gradients of the core are alive from the last loop's backward pass to the first's, under any of them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lt2titan.model.lt2 import LT2

logger = logging.getLogger("lt2titan")

# A block hands on what it did not write of the carry (RWKV-7's first values), which autograd calls a view. Nothing here
# writes into a block's output; gradients are those of one whole model (tests/unit/parallel).
warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)

PER_STEP_SHARE = 1 / 2
"""Of device memory that weights, gradients and optimizer state may take with per_step or deferred reductions; the
rest is left to activations."""

PER_PASS_SHARE = 2 / 3
"""The same for per_pass, whose gathered parameters are whole only when some of the activations are gone."""


@dataclass(frozen=True)
class FSDPPlan:
    """What "auto" came to. loop_reshard: "per_step", "per_pass" or "per_visit"."""

    loop_reshard: str
    defers_reductions: bool


def plan_fsdp(
    *,
    loop_reshard: str,
    defer_reductions: str,
    n_parameters: int,
    n_shards: int,
    n_ranks: int,
    n_microbatches: int,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    cpu_offload: bool,
    device_memory: int,
) -> FSDPPlan:
    """Choose what is "auto" by a memory estimate; logs the figures and the choice.

    Counted per device: fp32 weights, gradients and two Adam moments (16 bytes per sharded parameter, none with
    offloading), gathered parameters and whole gradients in ``param_dtype``, and with deferred reductions the whole
    gradients kept between microbatches in ``reduce_dtype``. Activations are not known here: they get the rest, see
    PER_STEP_SHARE and PER_PASS_SHARE.

    Args:
        loop_reshard: "auto", "per_step", "per_pass" or "per_visit".
        defer_reductions: "auto", "on" or "off".
        n_parameters: of the whole model, or of this rank's part of it under tensor parallelism.
        n_shards: ranks over which they are sharded.
        n_ranks: ranks over which gradients are reduced (shards x replicas); 1 has nothing to reduce.
        n_microbatches: per optimizer step.
        device_memory: bytes.
    """
    sharded = 0 if cpu_offload else 16 * n_parameters // n_shards
    gathered = gradients = n_parameters * param_dtype.itemsize
    kept = n_parameters * reduce_dtype.itemsize
    needed = sharded + gathered + gradients
    chosen = loop_reshard
    if chosen == "auto":
        chosen = "per_visit"
        if needed <= PER_STEP_SHARE * device_memory:
            chosen = "per_step"
        elif needed <= PER_PASS_SHARE * device_memory:
            chosen = "per_pass"
    needed_to_defer = needed + kept - (gathered if chosen == "per_visit" else 0)
    fits = needed_to_defer <= PER_STEP_SHARE * device_memory
    can_defer = n_microbatches > 1 and n_ranks > 1
    defers = can_defer and (fits if defer_reductions == "auto" else defer_reductions == "on")
    logger.info(
        "FSDP2 memory: %s sharded weights, gradients and optimizer state, %s gathered parameters, %s whole gradients, "
        "%s more to defer reductions; %s per device: fsdp_loop_reshard = %s (%s), reductions %s (%s)",
        *map(_gib, (sharded, gathered, gradients, kept, device_memory)),
        chosen,
        "auto" if loop_reshard == "auto" else "as configured",
        "deferred to the last microbatch" if defers else "after every microbatch" if can_defer else "nothing to defer",
        defer_reductions,
    )
    return FSDPPlan(chosen, defers)


def apply_fsdp(
    model: LT2,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    loop_reshard: str = "per_step",
    cpu_offload: bool = False,
) -> None:
    """Shard every block by itself, and the rest of the model as the root.

    Gradients are summed over ranks, not averaged: the loss is already divided by the number of tokens of all ranks.

    Args:
        mesh: ("shard",), or ("replicate", "shard") for HSDP.
        param_dtype: dtype of compute and of gathered parameters; the shards keep theirs (fp32 master weights).
        reduce_dtype: dtype of the gradient reduction.
        loop_reshard: "per_step", "per_pass" or "per_visit", see above.
        cpu_offload: shards, their gradients and so the optimizer's state live in host memory; materialise them there.
    """
    # Inputs are not cast: decode states are updated in place and RoPE tables stay in fp32.
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
        ),
        # Pinning host memory needs CUDA.
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy(),
    }
    is_per_visit = loop_reshard == "per_visit"
    for block in model.core.blocks:
        fully_shard(block, reshard_after_forward=is_per_visit, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    for module in _fsdp_modules(model):
        module.set_reshard_after_backward(is_per_visit)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    if loop_reshard == "per_pass":
        model.core.register_forward_hook(_free_blocks)
    logger.info(
        "%s over %s ranks, compute in %s, reduction in %s, blocks gathered %s%s",
        "HSDP" if mesh.ndim == 2 else "FSDP2",
        " x ".join(map(str, mesh.shape)),
        param_dtype,
        reduce_dtype,
        loop_reshard,
        ", shards in host memory" if cpu_offload else "",
    )


def reshard(model: LT2) -> None:
    """Free the gathered parameters. Needed after every step's last backward pass and after every evaluation: while
    parameters are gathered, ``parameters()`` are not those that the optimizer and checkpoints know, and carry no
    gradient."""
    for module in _fsdp_modules(model):
        module.reshard()


def set_gradient_sync(model: LT2, enabled: bool) -> None:
    """Whether the coming backward passes reduce gradients over ranks, or add them up whole on each until one does."""
    for module in _fsdp_modules(model):
        module.set_requires_gradient_sync(enabled, recurse=False)


@contextmanager
def kept_gathered(model: LT2, loop_reshard: str) -> Iterator[None]:
    """For evaluations whose observers use a block's weights after its visit (see `LoopObserver.after_block`): what is
    gathered stays so, under per_visit too, and is freed at the end."""
    blocks = _fsdp_modules(model.core) if loop_reshard == "per_visit" else []
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
        reshard(model)


def _free_blocks(core: nn.Module, arguments: Any, h: torch.Tensor) -> None:
    """Without gradients there is no backward pass to save memory for."""
    if torch.is_grad_enabled():
        for module in _fsdp_modules(core):
            module.reshard()


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
