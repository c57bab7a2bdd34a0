"""The lightning indexer's scores and their greatest, in Triton.

Scores exist for a chunk of queries at a time (`CHUNK_NUMBERS` of them), as whole numbers in the same order. A number
that just top_k of them reach is found by bisection over its 32 bits, in the registers of one program (`SEARCHED`). A
longer row is thinned out before: the greatest score of every few neighbouring keys is kept too, and a number that top_k
of those reach is a lower bound that at least top_k keys reach, and not many more. So long rows are read once, and not
once per bit. They are where scores are so alike that many more reach it, and where a document is so short beside its
row that it has no top_k groups.

Places are written in ascending order, which lets the earlier of equal keys win.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt2titan.kernels.dsa.reference import document_starts

CHUNK_NUMBERS = 1 << 26
"""Scores, groups of keys and candidates that exist at a time: 256 MB, whatever the length."""

TILE_Q, TILE_K, WARPS, STAGES = 64, 128, 4, 3
"""Queries, and keys, of a program that computes scores; its warps; heads of queries that are loaded ahead."""

SEARCHED = 8192
"""Scores that a program bisects in its registers; twice top_k if that is more."""

LEAST = tl.constexpr(-2147483648)
"""What stands for no key."""


@triton.jit
def _order_kernel(
    q,  # (B, L, J, E)
    k,  # (B, Lk, E)
    w,  # (B, L, J)
    starts,  # (B, L)
    keys,  # (B, n_rows, n_keys) int32: sortable
    maxima,  # (B, n_rows, n_groups) int32: the greatest of every GROUP keys, unless that is 1
    length,
    key_length,  # Lk, of whose keys the last L are the queries' own
    first,  # query of the chunk
    n_rows,
    n_keys,
    forced_local,
    FORCED_FIRST: tl.constexpr,
    N_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of a tile of queries and keys."""
    row, column, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token_rows = batch.to(tl.int64) * length + first + rows
    own = key_length - length + first + rows
    places = column * BLOCK_K + tl.arange(0, BLOCK_K)
    is_row = rows < n_rows
    start = tl.load(starts + token_rows, mask=is_row, other=0)
    last_own = key_length - length + first + tl.minimum(row * BLOCK_Q + BLOCK_Q, n_rows) - 1
    first_start = tl.load(starts + batch.to(tl.int64) * length + first + row * BLOCK_Q)
    # Tiles that nobody sees are never read.
    if (column * BLOCK_K <= last_own) & (column * BLOCK_K + BLOCK_K > first_start):
        channels = tl.arange(0, BLOCK_WIDTH)
        is_channel = channels < WIDTH
        is_key = places < n_keys
        base = batch.to(tl.int64) * key_length
        k_tile = tl.load(
            k + (base + places)[:, None] * WIDTH + channels, mask=is_key[:, None] & is_channel[None, :], other=0.0
        )
        score = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)
        for head in range(N_HEADS):
            row_of_head = token_rows * N_HEADS + head
            q_tile = tl.load(
                q + row_of_head[:, None] * WIDTH + channels, mask=is_row[:, None] & is_channel[None, :], other=0.0
            )
            weight = tl.load(w + row_of_head, mask=is_row, other=0.0).to(tl.float32)
            product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            score += weight[:, None] * tl.maximum(product, 0.0)
        score = tl.where(score == 0.0, 0.0, score)  # -0 is 0
        key = score.to(tl.int32, bitcast=True)
        key = tl.where(key < 0, key ^ 0x7FFFFFFF, key)  # the order of floats as that of whole numbers
        forced = places[None, :] > own[:, None] - forced_local
        if FORCED_FIRST:
            forced = forced | (places[None, :] == start[:, None])
        key = tl.where(forced, 0x7FFFFFFF, key)
        seen = (places[None, :] <= own[:, None]) & (places[None, :] >= start[:, None])
        key = tl.where(seen, key, LEAST)
        chunk_rows = (batch.to(tl.int64) * n_rows + rows)[:, None]
        tl.store(keys + chunk_rows * n_keys + places[None, :], key, mask=is_row[:, None] & is_key[None, :])
        if GROUP > 1:
            greatest = tl.max(tl.reshape(key, [BLOCK_Q, BLOCK_K // GROUP, GROUP]), axis=2)
            n_groups = tl.cdiv(n_keys, GROUP)
            groups = column * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
            is_group = is_row[:, None] & (groups < n_groups)[None, :]
            tl.store(maxima + chunk_rows * n_groups + groups[None, :], greatest, mask=is_group)


@triton.jit
def _bound(keys, n_wanted, n_enough):
    """A number that at least n_wanted of keys (N,) reach, and at most n_enough; if there is none, the greatest that
    n_wanted reach. LEAST if fewer than n_wanted are above it."""
    n_reach = tl.sum((keys >= 0).to(tl.int32))
    bound = tl.where(n_reach >= n_wanted, 0, LEAST)
    n_reach = tl.where(n_reach >= n_wanted, n_reach, 2147483647)
    step = 1 << 30
    while (n_reach > n_enough) & (step > 0):
        n_above = tl.sum((keys >= bound + step).to(tl.int32))
        is_bound = n_above >= n_wanted
        bound = tl.where(is_bound, bound + step, bound)
        n_reach = tl.where(is_bound, n_above, n_reach)
        step = step >> 1
    return bound


@triton.jit
def _bound_of_row(key_row, start, stop, n_wanted, BLOCK: tl.constexpr):
    """As `_bound`, of a row of any length: it is read once for each bit."""
    bound = LEAST
    step = 1 << 30
    for bit in range(32):
        middle = tl.where(bit == 0, 0, bound + step)
        n_reach = 0
        for place in range(start, stop, BLOCK):
            places = place + tl.arange(0, BLOCK)
            key = tl.load(key_row + places, mask=places < stop, other=LEAST)
            n_reach += tl.sum((key >= middle).to(tl.int32))
        bound = tl.where(n_reach >= n_wanted, middle, bound)
        step = tl.where(bit == 0, step, step >> 1)
    return bound


@triton.jit
def _thin_kernel(
    keys,  # (B, n_rows, n_keys) int32
    maxima,  # (B, n_rows, n_groups) int32
    starts,  # (B, L)
    bounds,  # (B, n_rows) int32: lower bounds of what is chosen
    counts,  # (B, n_rows, 2) int32: keys above the bound, and at it
    candidates,  # (B, n_rows, SEARCHED) int32: places of the first keys that reach it, ascending
    length,
    key_length,
    first,
    n_rows,
    n_keys,
    N_SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCHED: tl.constexpr,
):
    """Those keys of a query that can be among the greatest N_SLOTS, of a row that is too long to search."""
    row, batch = tl.program_id(0), tl.program_id(1)
    chunk_row = batch.to(tl.int64) * n_rows + row
    own = key_length - length + first + row
    start = tl.load(starts + batch.to(tl.int64) * length + first + row).to(tl.int32)
    if own + 1 - start > SEARCHED:
        groups = start // GROUP + tl.arange(0, SEARCHED)
        is_group = groups <= own // GROUP
        greatest = tl.load(maxima + chunk_row * tl.cdiv(n_keys, GROUP) + groups, mask=is_group, other=LEAST)
        bound = _bound(greatest, N_SLOTS, N_SLOTS + N_SLOTS // 16)
        n_above, n_equal = 0, 0
        for place in range(start, own + 1, BLOCK):
            places = place + tl.arange(0, BLOCK)
            key = tl.load(keys + chunk_row * n_keys + places, mask=places <= own, other=LEAST)
            reaches = (places <= own) & (key >= bound)
            slots = n_above + n_equal + tl.cumsum(reaches.to(tl.int32), axis=0) - 1
            tl.store(candidates + chunk_row * SEARCHED + slots, places, mask=reaches & (slots < SEARCHED))
            n_equal += tl.sum((reaches & (key == bound)).to(tl.int32))
            n_above += tl.sum((reaches & (key > bound)).to(tl.int32))
        tl.store(bounds + chunk_row, bound)
        tl.store(counts + 2 * chunk_row, n_above)
        tl.store(counts + 2 * chunk_row + 1, n_equal)


@triton.jit
def _select_kernel(
    keys,  # (B, n_rows, n_keys) int32
    bounds,  # (B, n_rows), counts (B, n_rows, 2), candidates (B, n_rows, SEARCHED): of `_thin_kernel`, if IS_THINNED
    counts,
    candidates,
    starts,  # (B, L)
    indices,  # (B, L, N_SLOTS) int32
    length,
    key_length,
    first,
    n_rows,
    n_keys,
    N_SLOTS: tl.constexpr,
    IS_THINNED: tl.constexpr,
    SEARCHED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """The selection of one query."""
    row, batch = tl.program_id(0), tl.program_id(1)
    token_row = batch.to(tl.int64) * length + first + row
    chunk_row = batch.to(tl.int64) * n_rows + row
    own = key_length - length + first + row
    start = tl.load(starts + token_row).to(tl.int32)
    out = indices + token_row * N_SLOTS
    key_row = keys + chunk_row * n_keys
    n_seen = own + 1 - start
    n_candidates, n_above = n_seen, N_SLOTS
    if IS_THINNED:  # noqa: SIM102 -- one is known when it is compiled
        if n_seen > SEARCHED:
            n_above = tl.load(counts + 2 * chunk_row)
            n_candidates = n_above + tl.load(counts + 2 * chunk_row + 1)
    if n_seen <= N_SLOTS:
        for slot in range(0, N_SLOTS, BLOCK_SLOTS):
            slots = slot + tl.arange(0, BLOCK_SLOTS)
            tl.store(out + slots, tl.where(slots < n_seen, start + slots, -1), mask=slots < N_SLOTS)
    elif n_candidates <= SEARCHED:
        candidate = tl.arange(0, SEARCHED)
        is_candidate = candidate < n_candidates
        places = start + candidate
        if IS_THINNED:  # noqa: SIM102
            if n_seen > SEARCHED:
                places = tl.load(candidates + chunk_row * SEARCHED + candidate, mask=is_candidate, other=0)
        key = tl.load(key_row + places, mask=is_candidate, other=LEAST)
        bound = _bound(key, N_SLOTS, N_SLOTS)
        chosen = is_candidate & (key >= bound)
        if tl.sum(chosen.to(tl.int32)) > N_SLOTS:
            above = key > bound
            is_tie = is_candidate & (key == bound)
            rank = tl.cumsum(is_tie.to(tl.int32), axis=0)
            chosen = above | (is_tie & (rank <= N_SLOTS - tl.sum(above.to(tl.int32))))
        slots = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(out + slots, places, mask=chosen)
    elif IS_THINNED:
        # So many reach the lower bound. If it is because they are equal to it, it is the bound itself.
        bound = tl.load(bounds + chunk_row)
        if n_above >= N_SLOTS:
            bound = _bound_of_row(key_row, start, own + 1, N_SLOTS, BLOCK)
            n_above = 0
            for place in range(start, own + 1, BLOCK):
                places = place + tl.arange(0, BLOCK)
                key = tl.load(key_row + places, mask=places <= own, other=LEAST)
                n_above += tl.sum((key > bound).to(tl.int32))
        n_written, n_ties = 0, 0
        for place in range(start, own + 1, BLOCK):
            places = place + tl.arange(0, BLOCK)
            key = tl.load(key_row + places, mask=places <= own, other=LEAST)
            is_tie = (places <= own) & (key == bound)
            rank = n_ties + tl.cumsum(is_tie.to(tl.int32), axis=0)
            chosen = (key > bound) | (is_tie & (rank <= N_SLOTS - n_above))
            slots = n_written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            tl.store(out + slots, places, mask=chosen)
            n_written += tl.sum(chosen.to(tl.int32))
            n_ties += tl.sum(is_tie.to(tl.int32))


def select(
    q: Tensor, k: Tensor, w: Tensor, cu_seqlens: Tensor | None, top_k: int, forced_first: bool, forced_local: int
) -> Tensor:
    """As `reference.select_reference`."""
    q, k, w = q.contiguous(), k.contiguous(), w.contiguous()
    (batch, length, n_heads, width), key_length = q.shape, k.shape[1]
    n_slots = min(top_k, key_length)
    starts = document_starts(batch, length, key_length, cu_seqlens, q.device).int()
    indices = torch.empty(batch, length, n_slots, dtype=torch.int32, device=q.device)
    searched = min(max(SEARCHED, triton.next_power_of_2(2 * n_slots)), triton.next_power_of_2(key_length))
    is_thinned = key_length > searched
    of_query = key_length + (2 * searched if is_thinned else 0)
    chunk = max(1, min(length, CHUNK_NUMBERS // (batch * of_query)))

    def room(*shape: int) -> Tensor:
        return torch.empty(batch, chunk, *shape, dtype=torch.int32, device=q.device)

    keys, bounds = room(key_length), room()
    maxima, *thinned = (room(n if is_thinned else 0) for n in (searched, 2, searched))
    sizes = {
        "N_SLOTS": n_slots,
        "SEARCHED": searched,
        "BLOCK": min(4096, 2 * searched),
        "num_warps": 8 if searched >= 2048 else 4,
    }
    for first in range(0, length, chunk):
        n_rows = min(chunk, length - first)
        n_keys = key_length - length + first + n_rows
        group = triton.next_power_of_2(triton.cdiv(n_keys, searched))  # as few keys as leave maxima to be searched
        tile_k = max(TILE_K, group)
        place = (length, key_length, first, n_rows, n_keys)
        # Chunks of queries that all see no more than there are slots need no scores; with documents nobody knows.
        if cu_seqlens is not None or n_keys > n_slots:
            grid = (triton.cdiv(n_rows, TILE_Q), triton.cdiv(n_keys, tile_k), batch)
            _order_kernel[grid](
                q,
                k,
                w,
                starts,
                keys,
                maxima,
                *place,
                forced_local,
                FORCED_FIRST=forced_first,
                N_HEADS=n_heads,
                WIDTH=width,
                BLOCK_WIDTH=max(16, triton.next_power_of_2(width)),
                BLOCK_Q=TILE_Q,
                BLOCK_K=tile_k,
                GROUP=group,
                PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
                num_warps=WARPS,
                num_stages=STAGES,
            )
        if group > 1:
            _thin_kernel[(n_rows, batch)](keys, maxima, starts, bounds, *thinned, *place, GROUP=group, **sizes)
        _select_kernel[(n_rows, batch)](
            keys,
            bounds,
            *thinned,
            starts,
            indices,
            *place,
            IS_THINNED=is_thinned,
            BLOCK_SLOTS=min(1024, triton.next_power_of_2(n_slots)),
            **sizes,
        )
    return indices
