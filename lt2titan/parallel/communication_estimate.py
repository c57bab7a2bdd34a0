"""What ranks send each other in an optimizer step, from sizes alone: no devices, no processes.

Collectives are counted as rings: of n ranks each sends (n - 1) / n of what is gathered or reduced and scattered, and
twice that in an all-reduce.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lt2titan.model.lt2 import LT2
from lt2titan.model.recompute import RecomputePlan
from lt2titan.parallel.activation_memory import CoreMemory
from lt2titan.parallel.float8 import gathered_bytes
from lt2titan.parallel.layout import Layout
from lt2titan.parallel.layout_estimate import n_own_embedding


class Sent(NamedTuple):
    """Collectives of one kind in an optimizer step, and the bytes that a device sends in all of them."""

    n_times: int
    n_bytes: int


def of_parameters(
    model: LT2, layout: Layout, *, n_microbatches: int, n_loops: int, dtype: torch.dtype, reduce_dtype: torch.dtype
) -> dict[str, Sent]:
    """What FSDP2 sends: parameters and their gradients (see parallel/fsdp.py). Of an embedding that is not tied more
    than that in steps of truncated backpropagation, which give it no gradient."""
    n_parameters = sum(p.numel() for p in model.parameters()) // layout.n_tensor
    in_core = sum(p.numel() for block in model.core.blocks for p in block.parameters()) // layout.n_tensor
    n_blocks, m = len(model.core.blocks), n_microbatches
    embedding = n_own_embedding(model) // layout.n_tensor
    root = n_parameters - in_core - embedding
    n_embeddings = int(embedding > 0)
    # How often the blocks are gathered, each of them, the root, and the embedding.
    visits = {"per_step": 1, "per_pass": m + 1, "per_visit": 2 * n_loops * m}[layout.loop_reshard]
    root_visits, embedding_visits = (m, 2 * m) if layout.loop_reshard == "per_visit" else (1, 1)
    gathers = visits * n_blocks + root_visits + embedding_visits * n_embeddings
    core_bytes = sum(gathered_bytes(block.parameters(), dtype) for block in model.core.blocks) // layout.n_tensor
    gathered = visits * core_bytes + (root_visits * root + embedding_visits * embedding) * dtype.itemsize
    # Deferred, a block that is visited several times is reduced twice (see parallel/fsdp.py).
    again = 2 if n_loops > 1 else 1
    rounds = (again, 1) if layout.defers_reductions else (m, m)
    reduces = rounds[0] * n_blocks + rounds[1] * (1 + n_embeddings)
    reduced = (rounds[0] * in_core + rounds[1] * (root + embedding)) * reduce_dtype.itemsize
    ring = _ring(layout.n_shards)
    result = {}
    if ring:
        result["all-gather"] = Sent(gathers, int(gathered * ring))
        result["reduce-scatter"] = Sent(reduces, int(reduced * ring))
    if layout.n_replicas > 1:
        result["all-reduce"] = Sent(reduces, int(2 * reduced * _ring(layout.n_replicas) / layout.n_shards))
    return result


def of_activations(
    core: CoreMemory, layout: Layout, plan: RecomputePlan, *, n_microbatches: int, n_loops: int, n_backward_loops: int
) -> dict[str, Sent]:
    """What tensor and context parallelism send in the core. Left out: embedding, final norm, head and loss, which do
    so once per microbatch and not per visit, sums over channels inside of mixers (HGRN2, Mamba-2), and what tensor-
    parallel ranks gather of each other's heads to choose alike (nsa of one key head, dsa).

    Tensor parallelism (see parallel/tensor_parallel.py) gathers or sums hidden states twice per visit and direction;
    context parallelism gathers what mixers fetch of earlier stretches, and scatters gradients of it back. What is
    computed again is sent again, but for what mode selective keeps.

    Args:
        core: of one microbatch on a rank, of whole hidden states; measured with the layout's stretches.
        n_loops, n_backward_loops: that run; 0 backward loops for all.
    """
    first = n_loops - (n_backward_loops or n_loops)
    m, n_tensor = n_microbatches, layout.n_tensor
    forward = scattered = backward = 0  # visits: forward passes that gather, those that scatter, backward passes
    fetched = given = Sent(0, 0)
    for loop in range(n_loops):
        own = plan.of_loop(loop, n_loops)
        again = own.loops + own.blocks if loop >= first else 0
        is_kept = own.block_contexts is not None
        n_blocks = len(core.blocks[loop])
        forward += (1 + again) * n_blocks
        scattered += (1 if is_kept else 1 + again) * n_blocks
        backward += n_blocks if loop >= first else 0
        # Heads are split, and what is gathered of earlier stretches with them; dsa's index keys count as if they were.
        n_bytes = sum(b.gathered // (1 if b.gathers_whole else n_tensor) for b in core.blocks[loop])
        gathers = Sent(sum(b.gathers for b in core.blocks[loop]), n_bytes)
        fetched = _plus(fetched, gathers, 1 + again)
        given = _plus(given, gathers, 1 if loop >= first else 0)
    result = {}
    ring = _ring(n_tensor)
    if ring and layout.sequence_parallel:
        # The backward pass of a gather is a scatter, and the other way round.
        result["all-gather of tokens"] = _sent(2 * (forward + backward) * m, core.input * ring)
        result["reduce-scatter of tokens"] = _sent(2 * (scattered + backward) * m, core.input * ring)
    elif ring:
        result["all-reduce of tokens"] = _sent(2 * (scattered + backward) * m, 2 * core.input * ring)
    if layout.n_context > 1:
        ring = _ring(layout.n_context)
        result["all-gather of earlier stretches"] = Sent(fetched.n_times * m, int(fetched.n_bytes * m * ring))
        result["reduce-scatter of their gradients"] = Sent(given.n_times * m, int(given.n_bytes * m * ring))
    return result


def _sent(count: int, bytes_each: float) -> Sent:
    return Sent(count, int(count * bytes_each))


def _plus(total: Sent, more: Sent, times: int) -> Sent:
    return Sent(total.n_times + times * more.n_times, total.n_bytes + times * more.n_bytes)


def _ring(n: int) -> float:
    return (n - 1) / n
