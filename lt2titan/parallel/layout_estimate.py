"""What a training step needs on one device and sends over the network, from sizes alone: no devices, no processes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lt2titan.model.head import CHUNK
from lt2titan.model.lt2 import LT2
from lt2titan.parallel.activation_checkpoint import recompute_plan
from lt2titan.parallel.activation_memory import core_memory

FP32 = 4


class Layout(NamedTuple):
    """Degrees of parallelism, and how FSDP2 treats a looped stack (see parallel/fsdp.py)."""

    n_replicas: int
    n_shards: int
    n_tensor: int
    loop_reshard: str
    defers_reductions: bool
    cpu_offload: bool


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
    is_compiled: bool = False,
    memory_budget: float = 1.0,
    n_microbatches: int = 1,
) -> dict[str, int]:
    """Bytes per device by category, and "peak", the largest of four moments:

    - the loss, when all activations that are kept wait for the backward pass;
    - the last loop's backward pass, the first to come, which computes again what was not kept;
    - that of the loop before, when the core's whole gradients stand beside it, and one loop less;
    - the end, when the root's gradient (of embedding and head) and a block's are being reduced.

    Sharded gradients exist before the last moment only if there were earlier microbatches. Left out: temporary tensors
    inside operators, what the allocator wastes. Tensor parallelism divides weights and logits; activations are divided
    as under sequence parallelism.

    Args:
        model: unsharded, ``meta`` will do.
        batch_size, seq_len: of a microbatch.
        dtype: of compute.
        n_loops, n_backward_loops: the most that a step runs; 0 backward loops for all.
        is_compiled: blocks and loss are.
        memory_budget: of the mode of that name.
        n_microbatches: per optimizer step.
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
    core = core_memory(
        model,
        batch_size=batch_size,
        length=seq_len,
        dtype=dtype,
        is_compiled=is_compiled,
        memory_budget=memory_budget if activation_checkpoint == "memory_budget" else 1.0,
    )
    activations = core.under(plan, n_loops=n_loops, n_backward_loops=n_backward_loops)
    kept, peak, later = (size // layout.n_tensor for size in activations)
    vocab, n_tokens = model.head_weight.shape[0] // layout.n_tensor, batch_size * seq_len
    root = n_parameters - sum(blocks)
    head = vocab * model.config.dim * dtype.itemsize
    # Eager: log-probabilities and two gradients in fp32. Compiled: logits, which their gradient replaces.
    per_score = dtype.itemsize if is_compiled else 3 * FP32
    sizes = {
        "weights": shard * FP32 * on_device,
        "gradients": shard * FP32 * on_device,
        "optimizer state": 2 * shard * FP32 * on_device,
        "gathered parameters": gathered * dtype.itemsize,
        "whole gradients": n_parameters * (FP32 if layout.defers_reductions else dtype.itemsize),
        "activations kept": kept,
        "activations in backward": peak,
        "logits of a chunk": min(CHUNK, n_tokens) * vocab * per_score,
        # A chunk's, and the sum of those before.
        "gradient of the head": head * (1 + (n_tokens > CHUNK)),
    }
    resident = sum(sizes[name] for name in ("weights", "optimizer state", "gathered parameters"))
    before = sizes["whole gradients" if layout.defers_reductions else "gradients"] if n_microbatches > 1 else 0
    in_core = sum(blocks) * dtype.itemsize
    reduced = (root + max(blocks)) * (dtype.itemsize + FP32)
    moments = (
        before + kept + sizes["logits of a chunk"] + sizes["gradient of the head"],
        before + peak + head,
        before + later + head + in_core,
        sizes["gradients"] + reduced,
    )
    return sizes | {"peak": resident + max(moments)}


def communication_per_step(
    model: LT2, layout: Layout, *, n_microbatches: int, n_loops: int, dtype: torch.dtype, reduce_dtype: torch.dtype
) -> dict[str, tuple[int, int]]:
    """Collectives of FSDP2 in one optimizer step: (how many, bytes that a device sends in all of them).

    Rings: of n ranks each sends (n - 1) / n of what is gathered or reduced, and twice that in an all-reduce. The
    collectives of tensor parallelism, which follow activations, are not counted.
    """
    n_parameters = sum(p.numel() for p in model.parameters()) // layout.n_tensor
    in_core = sum(p.numel() for block in model.core.blocks for p in block.parameters()) // layout.n_tensor
    n_blocks, m = len(model.core.blocks), n_microbatches
    root = n_parameters - in_core
    # How often the blocks are gathered, each of them, and the root.
    visits = {"per_step": 1, "per_pass": m + 1, "per_visit": 2 * n_loops * m}[layout.loop_reshard]
    root_visits = m if layout.loop_reshard == "per_visit" else 1
    gathers = visits * n_blocks + root_visits
    gathered = (visits * in_core + root_visits * root) * dtype.itemsize
    # Deferred, a block that is visited several times is reduced twice (see parallel/fsdp.py).
    again = 2 if n_loops > 1 else 1
    rounds = (again, 1) if layout.defers_reductions else (m, m)
    reduces = rounds[0] * n_blocks + rounds[1]
    reduced = (rounds[0] * in_core + rounds[1] * root) * reduce_dtype.itemsize
    ring = (layout.n_shards - 1) / layout.n_shards
    result = {
        "all-gather": (gathers if ring else 0, int(gathered * ring)),
        "reduce-scatter": (reduces if ring else 0, int(reduced * ring)),
    }
    if layout.n_replicas > 1:
        ring = 2 * (layout.n_replicas - 1) / layout.n_replicas / layout.n_shards
        result["all-reduce"] = (reduces, int(reduced * ring))
    return result
