"""Fully sharded data parallelism (FSDP2) for a stack that is visited several times."""

from __future__ import annotations

import logging

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lt2titan.model.lt2 import LT2

logger = logging.getLogger("lt2titan")


def apply_fsdp(model: LT2, mesh: DeviceMesh, param_dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
    """Shard every block by itself, and embedding, norm, rho and head (which may be tied) together as the root.

    What is gathered stays whole until `reshard` after the last backward pass: one all-gather per block and step,
    whatever the numbers of loops and microbatches. Gradients are summed over ranks, not averaged: the loss is already
    divided by the number of tokens of all ranks.

    Args:
        mesh: one-dimensional, over the data-parallel ranks.
        param_dtype: dtype of compute and of gathered parameters; the shards keep theirs (fp32 master weights).
        reduce_dtype: dtype of the gradient reduction.
    """
    # Inputs are not cast: decode states are updated in place and RoPE tables stay in fp32.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in model.core.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in _fsdp_modules(model):
        module.set_reshard_after_backward(False)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    logger.info("FSDP2 over %d ranks, compute in %s, reduction in %s", mesh.size(), param_dtype, reduce_dtype)


def reshard(model: LT2) -> None:
    """Free the gathered parameters. Needed after every backward pass or evaluation: while parameters are gathered,
    ``parameters()`` are not those that the optimizer and checkpoints know, and carry no gradient."""
    for module in _fsdp_modules(model):
        module.reshard()


def _fsdp_modules(model: LT2) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
