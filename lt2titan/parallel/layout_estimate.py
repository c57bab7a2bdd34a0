"""What a training step needs on one device, from sizes alone: no devices, no processes."""

from __future__ import annotations

import torch

from lt2titan.model.head import CHUNK
from lt2titan.model.lt2 import LT2
from lt2titan.parallel.activation_checkpoint import recompute_plan
from lt2titan.parallel.activation_memory import CoreMemory
from lt2titan.parallel.float8 import float8_bytes, gathered_bytes
from lt2titan.parallel.layout import Layout

FP32 = 4


def gathered_parameters(model: LT2, layout: Layout, dtype: torch.dtype, recomputes_loops: bool) -> tuple[int, int]:
    """Bytes of parameters that are whole while the core runs, at the most: of the head's group and the embedding, and
    of blocks.

    Under per_visit an embedding of its own is not, and of blocks these are the one at work, the buffer that it was
    gathered into, and the next one's; but FSDP2 frees nothing that is computed again in the backward pass, so that
    modes loop and nested hold the whole core there.
    """
    n_in_blocks = sum(p.numel() for block in model.core.blocks for p in block.parameters())
    n_root = sum(p.numel() for p in model.parameters()) - n_in_blocks
    if layout.loop_reshard == "per_visit":
        n_root -= n_own_embedding(model)
    blocks = [gathered_bytes(block.parameters(), dtype) for block in model.core.blocks]
    is_freed = layout.loop_reshard == "per_visit" and not recomputes_loops
    return n_root * dtype.itemsize, min(3 * max(blocks), sum(blocks)) if is_freed else sum(blocks)


def n_own_embedding(model: LT2) -> int:
    """Parameters of the embedding, if it is a group of its own (see parallel/fsdp.py); 0 if it is tied."""
    return 0 if model.head is None else model.embedding.weight.numel()


def memory_by_category(
    model: LT2,
    layout: Layout,
    core: CoreMemory,
    *,
    n_tokens: int,
    dtype: torch.dtype,
    activation_checkpoint: str,
    skip_last_loops: int,
    n_loops: int,
    n_backward_loops: int,
    is_compiled: bool = False,
    n_microbatches: int = 1,
) -> dict[str, int]:
    """Bytes per device by category, and "peak", the largest of four moments:

    - the loss, when all activations that are kept wait for the backward pass;
    - the last loop's backward pass, the first to come, which computes again what was not kept;
    - that of the loop before, when the core's whole gradients stand beside it, and one loop less;
    - the end, when the gradients of embedding, head and a block are being reduced.

    Sharded gradients exist before the last moment only if there were earlier microbatches. Left out: temporary tensors
    inside operators, what the allocator wastes. Under context parallelism this is the last rank, which has the keys and
    values of all others.

    Args:
        model: a tensor-parallel rank's share (`first_share`), not sharded otherwise; ``meta`` will do.
        core: what its blocks keep of a microbatch, see `core_memory`.
        n_tokens: of a microbatch on a rank.
        dtype: of compute.
        n_loops, n_backward_loops: the most that a step runs; 0 backward loops for all.
        is_compiled: blocks and loss are.
        n_microbatches: per optimizer step.
    """
    n_parameters = sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.core.blocks]
    shard = -(-n_parameters // layout.n_shards)
    on_device = 0 if layout.cpu_offload else 1
    plan = recompute_plan(
        "none" if activation_checkpoint == "memory_budget" else activation_checkpoint, skip_last_loops
    )
    kept, peak, later = core.under(plan, n_loops=n_loops, n_backward_loops=n_backward_loops)
    vocab = model.head_weight.shape[0]
    root = n_parameters - sum(blocks)
    gathered_root, gathered_blocks = gathered_parameters(model, layout, dtype, plan.loops)
    gathered_at_loss = gathered_root + (gathered_blocks if layout.loop_reshard == "per_step" else 0)
    head = vocab * model.config.dim * dtype.itemsize
    # Eager: log-probabilities and two gradients in fp32. Compiled: logits, which their gradient replaces.
    per_score = dtype.itemsize if is_compiled else 3 * FP32
    # Shards that are kept so beside the others, to be gathered again (see parallel/float8_linear.py).
    casts = 0 if layout.loop_reshard == "per_step" else float8_bytes(model.parameters())
    sizes = {
        "weights": shard * FP32 * on_device,
        "weights in float8": -(-casts // layout.n_shards),
        "gradients": shard * FP32 * on_device,
        "optimizer state": 2 * shard * FP32 * on_device,
        "gathered parameters": gathered_root + gathered_blocks,
        "whole gradients": n_parameters * (FP32 if layout.defers_reductions else dtype.itemsize),
        "activations kept": kept,
        "activations in backward": peak,
        "logits of a chunk": min(CHUNK, n_tokens) * vocab * per_score,
        # A chunk's, and the sum of those before.
        "gradient of the head": head * (1 + (n_tokens > CHUNK)),
    }
    resident = sizes["weights"] + sizes["weights in float8"] + sizes["optimizer state"]
    before = sizes["whole gradients" if layout.defers_reductions else "gradients"] if n_microbatches > 1 else 0
    in_core = sum(blocks) * dtype.itemsize
    reduced = (root + max(blocks)) * (dtype.itemsize + FP32)
    again = n_own_embedding(model) * dtype.itemsize if layout.loop_reshard == "per_visit" else 0
    at_loss = before + kept + sizes["logits of a chunk"] + sizes["gradient of the head"]
    moments = (
        gathered_at_loss + at_loss,
        sizes["gathered parameters"] + before + peak + head,
        sizes["gathered parameters"] + before + later + head + in_core,
        sizes["gathered parameters"] + again + sizes["gradients"] + reduced,
    )
    return sizes | {"peak": resident + max(moments)}
