"""Fully sharded data parallelism (FSDP2) for a stack that is visited several times.

Every block is a group that is gathered and reduced by itself, the embedding is one, which per_visit can free while the
core runs, and the head another, with norm and rho: the root. A tied embedding is the head and in its group. How long a
block stays gathered (``parallelism.fsdp_loop_reshard``), with L blocks, T loops and m microbatches per optimizer step:

    per_step   until `reshard` after the last backward pass: L all-gathers per step, whatever T and m.
    per_pass   through all loops of a pass: freed when the core's forward pass ends, so that the head and the start of
               the backward pass, where most activations are alive, have that memory; gathered again for the backward
               pass and kept from there through the next microbatch's forward pass. L (m + 1) all-gathers.
    per_visit  through one visit of the block, forward or backward (torchtitan's reshard_after_forward = True): about
               2 L T m all-gathers. Loops that are recomputed (modes loop and nested) keep all blocks gathered in the
               backward pass, where FSDP2 frees nothing in between.

The root, and an embedding of its own, add one all-gather each per step; under per_visit one and two per microbatch.

Autograd adds up what the T visits give to a gradient, so it is reduced once per backward pass, not T times: one
reduce-scatter per group and microbatch, or at most two per group and step when they are deferred to the last one (a
block that is visited several times is then reduced twice: what earlier microbatches left, and the last one's share).
The whole gradients of the core are alive from the last loop's backward pass to the first's, under any of them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
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


def apply_fsdp(
    model: LT2,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    loop_reshard: str = "per_step",
    cpu_offload: bool = False,
) -> None:
    """Shard every block by itself, the embedding likewise unless it is tied, and the rest of the model as the root.

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
    # The head is in the root, not in a group beside it: observers of loops use it while the core runs.
    for part in [*model.core.blocks, *([] if model.head is None else [model.embedding])]:
        fully_shard(part, reshard_after_forward=is_per_visit, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    # Asked for before a block runs, the next one travels meanwhile, however slow the host is to launch the block's
    # kernels (under per_visit not from one loop to the next). In the backward pass FSDP2 does so by itself.
    for module, following in pairwise(_fsdp_modules(model)):  # in order of use: the root, embedding, blocks
        module.set_modules_to_forward_prefetch([following])
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
