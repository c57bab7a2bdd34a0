"""What ranks send each other in an optimizer step, from sizes alone: no devices, no processes. Collectives are counted
as rings (`visit_collectives.ring`).

Left out is what is small: numbers for the log, gradient norms and scales of float8 over all ranks, and, over tensor
ranks, gradients of what is whole on each of them (gains, biases, low-rank maps, key heads that they share). Mode
memory_budget, under which torch.compile may send again, counts as none.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from lt2titan.model.head import CHUNK
from lt2titan.model.lt2 import LT2
from lt2titan.model.recompute import RecomputePlan
from lt2titan.parallel.fake_blocks import TENSOR
from lt2titan.parallel.float8 import gathered_bytes
from lt2titan.parallel.layout import Layout
from lt2titan.parallel.layout_estimate import n_own_embedding
from lt2titan.parallel.visit_collectives import Collective, Visit, ring


class Sent(NamedTuple):
    """Collectives of one kind in an optimizer step, and the bytes that a device sends in all of them."""

    n_times: int
    n_bytes: int


def of_parameters(
    model: LT2,
    layout: Layout,
    *,
    n_microbatches: int,
    n_loops: int,
    n_backward_loops: int,
    dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> dict[str, Sent]:
    """What FSDP2 sends: parameters and their gradients (see parallel/fsdp.py).

    Args:
        model: a tensor-parallel rank's share (`first_share`).
        n_loops, n_backward_loops: that run; 0 backward loops for all. Otherwise an embedding that is not tied has no
            gradient; and under per_visit, unless there is just one, a block more is gathered, the next backwards, which
            is not used.
    """
    blocks, m = model.core.blocks, n_microbatches
    is_truncated = 0 < n_backward_loops < n_loops
    n_backward_loops = n_backward_loops or n_loops
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
    gathered_blocks = [gathered_bytes(block.parameters(), dtype) for block in blocks]
    embedding = n_own_embedding(model)
    root = sum(p.numel() for p in model.parameters()) - sum(in_blocks) - embedding
    has_embedding = int(embedding > 0)
    # How often the blocks are gathered, each of them, the last one besides, the root, and the embedding.
    visits = {"per_step": 1, "per_pass": m + 1, "per_visit": (n_loops + n_backward_loops) * m}[layout.loop_reshard]
    last_visits, root_visits, embedding_visits = 0, 1, has_embedding
    if layout.loop_reshard == "per_visit":
        last_visits = m if is_truncated and len(blocks) > 1 else 0
        root_visits, embedding_visits = m, has_embedding * (2 - is_truncated) * m
    gathers = visits * len(blocks) + last_visits + root_visits + embedding_visits
    gathered = visits * sum(gathered_blocks) + last_visits * gathered_blocks[-1]
    gathered += (root_visits * root + embedding_visits * embedding) * dtype.itemsize
    # Deferred, a block that is visited several times is reduced twice (see parallel/fsdp.py).
    of_block, of_rest = (min(n_backward_loops, 2), 1) if layout.defers_reductions else (m, m)
    learns_embedding = has_embedding * (not is_truncated)
    reduces = of_block * len(blocks) + of_rest * (1 + learns_embedding)
    reduced = (of_block * sum(in_blocks) + of_rest * (root + learns_embedding * embedding)) * reduce_dtype.itemsize
    result = {}
    if layout.n_shards > 1:
        result["all-gather over shard ranks"] = Sent(gathers, int(gathered * ring(layout.n_shards)))
        result["reduce-scatter over shard ranks"] = Sent(reduces, int(reduced * ring(layout.n_shards)))
    if layout.n_replicas > 1:
        result["all-reduce over replicate ranks"] = Sent(
            reduces, int(2 * reduced * ring(layout.n_replicas) / layout.n_shards)
        )
    return result


def of_activations(
    visits: list[list[Visit]],
    plan: RecomputePlan,
    *,
    n_microbatches: int,
    n_loops: int,
    n_backward_loops: int,
    has_gate: bool,
) -> dict[str, Sent]:
    """What tensor and context parallelism send in the core.

    Args:
        visits: as `visit_collectives` counts them, for the same ``plan``.
        has_gate: loops end with the residual gate, which needs what the last block returns: a loop that is computed
            again runs to its end. Without, it ends inside of the last block, or before it if that is computed again.
        n_loops, n_backward_loops: that run; 0 backward loops for all.
    """
    first = n_loops - (n_backward_loops or n_loops)
    total: Counter[Collective] = Counter()
    for loop in range(n_loops):
        own = plan.of_loop(loop, n_loops)
        for visit in visits[loop]:
            total += visit.forward
            if loop >= first:
                total += visit.backward
                total += visit.again if own.blocks else Counter()
        if own.loops and loop >= first:
            *others, last = visits[loop]
            total += sum((visit.forward for visit in others), Counter())
            if has_gate:
                total += last.forward
            elif not own.blocks:
                total += last.again
    return _by_kind(total, n_microbatches)


def of_ends(
    model: LT2, layout: Layout, *, n_tokens: int, dtype: torch.dtype, n_microbatches: int, is_truncated: bool
) -> dict[str, Sent]:
    """What tensor parallelism sends before and after the core: the embedding's sum, what the final norm makes ready for
    the head, and the loss's maxima and sums over the vocabulary, in the backward pass too.

    Args:
        n_tokens: of a microbatch on a rank.
        is_truncated: gradients do not reach the embedding.
    """
    if layout.n_tensor == 1:
        return {}
    hidden = n_tokens * model.config.dim * dtype.itemsize * ring(layout.n_tensor)
    total: Counter[Collective] = Counter()
    if layout.sequence_parallel:
        total[Collective("all-gather", TENSOR, int(hidden))] += 1 if is_truncated else 2
        total[Collective("reduce-scatter", TENSOR, int(hidden))] += 2
    else:
        total[Collective("all-reduce", TENSOR, int(2 * hidden))] += 2
    # Of each chunk a number per token, then two; chunks are computed again, unless there is only one.
    number = 2 * torch.promote_types(dtype, torch.float32).itemsize * ring(layout.n_tensor)
    times = 2 if n_tokens > CHUNK else 1
    for start in range(0, n_tokens, CHUNK):
        size = min(CHUNK, n_tokens - start)
        total[Collective("all-reduce", TENSOR, int(number * size))] += times
        total[Collective("all-reduce", TENSOR, int(2 * number * size))] += times
    return _by_kind(total, n_microbatches)


def together(*parts: dict[str, Sent]) -> dict[str, Sent]:
    """What all of ``parts`` are, by name."""
    result: dict[str, Sent] = {}
    for part in parts:
        for name, sent in part.items():
            before = result.get(name, Sent(0, 0))
            result[name] = Sent(before.n_times + sent.n_times, before.n_bytes + sent.n_bytes)
    return result


def _by_kind(collectives: Counter[Collective], n_microbatches: int) -> dict[str, Sent]:
    return together(
        *(
            {f"{kind} over {axis} ranks": Sent(n * n_microbatches, n * n_microbatches * n_bytes)}
            for (kind, axis, n_bytes), n in collectives.items()
        )
    )
