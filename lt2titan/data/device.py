"""From a batch on the host to a model's arguments on a device."""

from __future__ import annotations

from typing import Any

import torch

from lt2titan.data.loader import Batch
from lt2titan.kernels.packing import make_chunk_indices


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of LT2.forward; copies do not wait when the batch is in pinned memory.

    What packed kernels derive from document boundaries is made here, on the host: asking the device would stall it.
    """
    inputs = {name: getattr(batch, name).to(device, non_blocking=True) for name in ("tokens", "targets", "positions")}
    if batch.cu_seqlens is not None:
        inputs["cu_seqlens"] = batch.cu_seqlens.to(device, non_blocking=True)
        inputs["chunk_indices"] = make_chunk_indices(batch.cu_seqlens).to(device, non_blocking=True)
        inputs["max_seqlen"] = batch.tokens.shape[1]  # documents are cut at the end of a row
    return inputs
