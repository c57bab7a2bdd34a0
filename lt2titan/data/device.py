"""From a batch on the host to a model's arguments on a device."""

from __future__ import annotations

from typing import Any

import torch

from lt2titan.data.packing import Batch


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of LT2.forward; copies do not wait when the batch is in pinned memory."""
    names = ["tokens", "targets", "positions"]
    if batch.cu_seqlens is not None:
        names += ["cu_seqlens", "chunk_indices"]
    if batch.cu_seqlens_k is not None:
        names.append("cu_seqlens_k")
    inputs = {name: getattr(batch, name).to(device, non_blocking=True) for name in names}
    if batch.cu_seqlens is not None:
        inputs["max_seqlen"] = batch.tokens.shape[1]  # documents are cut at the end of a row
    return inputs
