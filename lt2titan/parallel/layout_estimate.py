"""What a training step needs on one device, from sizes alone: no devices, no processes."""

from __future__ import annotations

import torch

from lt2titan.model.head import CHUNK
from lt2titan.model.lt2 import LT2
from lt2titan.parallel.activation_checkpoint import recompute_plan
from lt2titan.parallel.activation_memory import core_memory
from lt2titan.parallel.layout import Layout

FP32 = 4


def memory_by_category(
    model: LT2,
    layout: Layout,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype,
    activation_checkpoint: str,
    skip_last_loops: int,
    n_loops: int,
    n_backward_loops: int,
) -> dict[str, int]:
    """Bytes per device by category, and "peak", the larger of two moments: the loss, when all activations that are
    kept wait for the backward pass, and the core's backward pass, when whole gradients stand beside them.

    Left out: temporary tensors inside operators, communication buffers, what the allocator wastes. The mode
    "memory_budget" counts as none: what it keeps is torch.compile's choice. Tensor parallelism divides weights and
    logits; activations are divided as under sequence parallelism. Under context parallelism this is the last rank,
    which has the keys and values of all others.

    Args:
        model: unsharded, ``meta`` will do.
        batch_size, seq_len: of a microbatch, whole rows.
        dtype: of compute.
        n_loops, n_backward_loops: the most that a step runs; 0 backward loops for all.
    """
    n_parameters = sum(p.numel() for p in model.parameters()) // layout.n_tensor
    blocks = [sum(p.numel() for p in block.parameters()) // layout.n_tensor for block in model.core.blocks]
    shard = -(-n_parameters // layout.n_shards)
    on_device = 0 if layout.cpu_offload else 1
    # per_visit holds the root, a block at work, and the next one on its way.
    gathered = n_parameters if layout.loop_reshard != "per_visit" else n_parameters - sum(blocks) + 2 * max(blocks)
    plan = recompute_plan(
        "none" if activation_checkpoint == "memory_budget" else activation_checkpoint, skip_last_loops
    )
    length = seq_len // layout.n_context
    activations = core_memory(
        model, batch_size=batch_size, length=length, dtype=dtype, n_context=layout.n_context
    ).under(plan, n_loops=n_loops, n_backward_loops=n_backward_loops)
    kept, peak = activations.kept // layout.n_tensor, activations.peak // layout.n_tensor
    vocab = model.head_weight.shape[0] // layout.n_tensor
    tokens = min(CHUNK, batch_size * length)
    sizes = {
        "weights": shard * FP32 * on_device,
        "gradients": shard * FP32 * on_device,
        "optimizer state": 2 * shard * FP32 * on_device,
        "gathered parameters": gathered * dtype.itemsize,
        "whole gradients": n_parameters * (FP32 if layout.defers_reductions else dtype.itemsize),
        "activations kept": kept,
        "activations in backward": peak,
        # Scores in the compute dtype, the same in fp32, and their gradient.
        "logits of a chunk": tokens * vocab * (2 * dtype.itemsize + FP32),
    }
    resident = sum(sizes[name] for name in ("weights", "gradients", "optimizer state", "gathered parameters"))
    at_loss = kept + sizes["logits of a chunk"]
    in_backward = peak + sizes["whole gradients"]
    return sizes | {"peak": resident + max(at_loss, in_backward)}
