"""The composition: how a model on ``meta`` is laid out over devices."""

from __future__ import annotations

import torch

from lt2titan.model.lt2 import LT2
from lt2titan.parallel.activation_checkpoint import apply_activation_checkpoint
from lt2titan.parallel.fsdp import apply_fsdp
from lt2titan.parallel.mesh import ParallelDims


def parallelize(
    model: LT2,
    dims: ParallelDims,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    activation_checkpoint: str,
) -> None:
    """Lay ``model`` out in place, in an order that matters: checkpointing first, so that what is recomputed runs
    inside the module that FSDP keeps gathered."""
    apply_activation_checkpoint(model, activation_checkpoint)
    apply_fsdp(model, dims.mesh["shard"], param_dtype, reduce_dtype)
