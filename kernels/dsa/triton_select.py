"""The keys of greatest index score, in Triton.

Scores exist for a chunk of queries at a time (`CHUNK_NUMBERS` of them), as whole numbers (triton_scores.py). A number
that just top_k of them reach is found by bisection in the registers of one program. A row of more than `SEARCHED` is
thinned out before: the greatest score of every few neighbouring keys is kept too, and a number that top_k of those
reach is a lower bound that at least top_k keys reach, and not many more. So long rows are read once, and not once per
bit. They are where scores are so alike that many more reach it, and where a document is so short beside its row that it
has no top_k groups.

Places are written in ascending order, which lets the earlier of equal keys win.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt2titan.kernels.dsa.reference import document_starts
from lt2titan.kernels.dsa.triton_scores import LEAST, MOST, write_scores

CHUNK_NUMBERS = 1 << 27
"""Scores, groups of keys and candidates that exist at a time: 512 MB, whatever the length."""

SEARCHED = 8192
"""Scores, or greatest scores of groups, that a program bisects in its registers; twice top_k if that is more. Of
a row that is no longer, or has been thinned out, half as many are mostly enough, and leave registers to other programs.
"""

BLOCK, WARPS = 2048, 8
"""Scores that are read at a time where a whole row is; warps of a program."""

PROGRAMS = 512
"""That look for rows of many candidates."""


@triton.jit
def _bound(keys, low, n_low, n_wanted, n_enough):
    """A number that at least n_wanted of keys (N,) reach, and at most n_enough; if there is none, the greatest that
    n_wanted reach. At most n_wanted are forced; if just as many, the result may be any number below MOST.

    low: a number that n_low reach, at least n_wanted; or LEAST.
    """
    high = tl.max(tl.where(keys == MOST, LEAST, keys)) + 1  # above it are forced ones alone
    n_positive = tl.sum((keys >= 0).to(tl.int32))
    is_positive = n_positive >= n_wanted
    high = tl.where(is_positive, high, tl.minimum(high, -1))  # which no score is: -0 is 0
    is_raised = is_positive & (low < 0)
    n_low = tl.where(is_raised, n_positive, n_low)
    low = tl.where(is_raised, 0, low)
    while (n_low > n_enough) & (high - low > 1):
        middle = low + (high - low) // 2
        n_reach = tl.sum((keys >= middle).to(tl.int32))
        is_low = n_reach >= n_wanted
        low = tl.where(is_low, middle, low)
        n_low = tl.where(is_low, n_reach, n_low)
        high = tl.where(is_low, high, middle)
    return low


@triton.jit
def _n_reach(key_row, start, stop, bound, BLOCK: tl.constexpr):
    """How many keys of a row reach a number."""
    n_reach = 0
    for place in range(start, stop, BLOCK):
        places = place + tl.arange(0, BLOCK)
        key = tl.load(key_row + places, mask=places < stop, other=LEAST)
        n_reach += tl.sum(((key >= bound) & (places < stop)).to(tl.int32))
    return n_reach


@triton.jit
def _bound_of_row(key_row, start, stop, low, n_wanted, BLOCK: tl.constexpr):
    """The greatest number that n_wanted of a row of any length reach, as they do ``low``: it is read once per bit."""
    low = low.to(tl.int64)
    high = tl.where(_n_reach(key_row, start, stop, low + 1, BLOCK) < n_wanted, low + 1, 1 << 31)
    while high - low > 1:
        middle = (low + high) // 2
        is_low = _n_reach(key_row, start, stop, middle, BLOCK) >= n_wanted
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle)
    return low.to(tl.int32)


@triton.jit
def _append(out, n_written, places, is_chosen, n_room, SIZE: tl.constexpr):
    """Write those of places (SIZE,) that are chosen to ``out``, behind n_written others, as far as there is room."""
    slots = n_written + tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
    slots = tl.where(is_chosen, slots, n_room)
    # Which thread writes does not matter; told so, Triton leaves everything in the registers where it is.
    pairs = tl.reshape((slots.to(tl.int64) << 32) | places, [SIZE], can_reorder=True)
    slots = (pairs >> 32).to(tl.int32)
    tl.store(out + slots, pairs.to(tl.int32), mask=slots < n_room)


@triton.jit
def _select_of_row(key_row, start, stop, low, out, N_SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """The selection from a row of any length."""
    bound = _bound_of_row(key_row, start, stop, low, N_SLOTS, BLOCK)
    n_above = tl.where(bound == MOST, 0, _n_reach(key_row, start, stop, bound + 1, BLOCK))
    n_written, n_ties = 0, 0
    for place in range(start, stop, BLOCK):
        places = place + tl.arange(0, BLOCK)
        key = tl.load(key_row + places, mask=places < stop, other=LEAST)
        is_tie = (places < stop) & (key == bound)
        rank = n_ties + tl.cumsum(is_tie.to(tl.int32), axis=0)
        chosen = (key > bound) | (is_tie & (rank <= N_SLOTS - n_above))
        _append(out, n_written, places, chosen, N_SLOTS, BLOCK)
        n_written += tl.sum(chosen.to(tl.int32))
        n_ties += tl.sum(is_tie.to(tl.int32))


@triton.jit
def _thin_kernel(
    keys,  # (B, n_rows, stride) int32
    maxima,  # (B, n_rows, SEARCHED) int32
    starts,  # (B, L)
    bounds,  # (B, n_rows) int32: lower bounds of what is chosen
    counts,  # (B, n_rows) int32: keys that reach it
    candidates,  # (B, n_rows, SEARCHED) int32: places of the first of them, ascending
    length,
    key_length,
    stride,
    first,
    n_rows,
    N_SLOTS: tl.constexpr,
    SEARCHED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Those keys of a query that can be among the greatest N_SLOTS, of a row that is too long to search."""
    row, batch = tl.program_id(0), tl.program_id(1)
    chunk_row = batch.to(tl.int64) * n_rows + row
    own = key_length - length + first + row
    start = tl.load(starts + batch.to(tl.int64) * length + first + row)
    if own + 1 - start > SEARCHED:
        groups = tl.arange(0, SEARCHED)
        is_seen = (groups >= start // GROUP) & (groups <= own // GROUP)
        greatest = tl.where(is_seen, tl.load(maxima + chunk_row * SEARCHED + groups), LEAST)
        bound = _bound(greatest, LEAST, SEARCHED, N_SLOTS, N_SLOTS + N_SLOTS // 16)
        n_reach = 0
        offsets = tl.arange(0, BLOCK)
        for block in range(start // BLOCK, own // BLOCK + 1):  # aligned, for wide loads
            place = block * BLOCK
            key = tl.load(keys + chunk_row * stride + place + offsets, mask=offsets < stride - place, other=LEAST)
            reaches = (key >= bound) & (offsets >= start - place) & (offsets <= own - place)
            _append(candidates + chunk_row * SEARCHED, n_reach, place + offsets, reaches, SEARCHED, BLOCK)
            n_reach += tl.sum(reaches.to(tl.int32))
        tl.store(bounds + chunk_row, bound)
        tl.store(counts + chunk_row, n_reach)


@triton.jit
def _select_kernel(
    keys,  # (B, n_rows, stride) int32
    bounds,  # (B, n_rows), counts (B, n_rows), candidates (B, n_rows, SEARCHED): of `_thin_kernel`, if IS_THINNED
    counts,
    candidates,
    starts,  # (B, L)
    indices,  # (B, L, N_SLOTS) int32
    length,
    key_length,
    stride,
    first,
    n_rows,
    N_SLOTS: tl.constexpr,
    SEARCHED: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_THINNED: tl.constexpr,
    FEWER: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Selections of queries that have more than FEWER candidates, and at most SIZE; or more, if SIZE is SEARCHED."""
    batch = tl.program_id(1).to(tl.int64)
    for row in tl.range(tl.program_id(0), n_rows, tl.num_programs(0), num_stages=1):
        chunk_row = batch * n_rows + row
        token_row = batch * length + first + row
        out = indices + token_row * N_SLOTS
        key_row = keys + chunk_row * stride
        own = key_length - length + first + row
        start = tl.load(starts + token_row)
        n_seen = own + 1 - start
        n_candidates, low = n_seen, LEAST
        if IS_THINNED:  # noqa: SIM102 -- one is known when it is compiled
            if n_seen > SEARCHED:
                n_candidates, low = tl.load(counts + chunk_row), tl.load(bounds + chunk_row)
        if (n_candidates > FEWER) & (n_candidates <= SIZE):
            candidate = tl.arange(0, SIZE)
            is_candidate = candidate < n_candidates
            places = start + candidate
            if IS_THINNED:  # noqa: SIM102
                if n_seen > SEARCHED:
                    places = tl.load(candidates + chunk_row * SEARCHED + candidate, mask=is_candidate, other=0)
            chosen = is_candidate
            if n_candidates > N_SLOTS:
                key = tl.load(key_row + places, mask=is_candidate, other=LEAST)
                bound = _bound(key, low, n_candidates, N_SLOTS, N_SLOTS)
                chosen = is_candidate & (key >= bound)
                if tl.sum(chosen.to(tl.int32)) > N_SLOTS:
                    above = key > bound
                    is_tie = is_candidate & (key == bound)
                    rank = tl.cumsum(is_tie.to(tl.int32), axis=0)
                    chosen = above | (is_tie & (rank <= N_SLOTS - tl.sum(above.to(tl.int32))))
            _append(out, 0, places, chosen, N_SLOTS, SIZE)
            tl.store(out + candidate, -1, mask=(candidate >= n_candidates) & (candidate < N_SLOTS))
        if IS_THINNED and SIZE == SEARCHED:  # noqa: SIM102
            if n_candidates > SIZE:
                _select_of_row(key_row, start, own + 1, low, out, N_SLOTS, BLOCK)


def select(
    q: Tensor, k: Tensor, w: Tensor, cu_seqlens: Tensor | None, top_k: int, forced_first: bool, forced_local: int
) -> Tensor:
    """As `reference.select_reference`."""
    q, k, w = q.contiguous(), k.contiguous(), w.contiguous()
    (batch, length), key_length = q.shape[:2], k.shape[1]
    n_slots = min(top_k, key_length)
    starts = document_starts(batch, length, key_length, cu_seqlens, q.device).int()
    indices = torch.empty(batch, length, n_slots, dtype=torch.int32, device=q.device)
    searched = min(max(SEARCHED, triton.next_power_of_2(2 * n_slots)), triton.next_power_of_2(key_length))
    is_thinned = key_length > searched
    of_query = key_length + (2 * searched if is_thinned else 0)
    chunk = max(1, min(length, CHUNK_NUMBERS // (batch * of_query)))

    def room(*shape: int) -> Tensor:
        return torch.empty(batch, chunk, *shape, dtype=torch.int32, device=q.device)

    stride = triton.cdiv(key_length, 16) * 16  # so that rows are aligned
    keys, bounds, counts = room(stride), room(), room()
    maxima, candidates = (room(searched if is_thinned else 0) for _ in range(2))
    few = max(searched // 2, triton.next_power_of_2(n_slots))
    ranges = [(0, few), (few, searched)] if few < searched else [(0, few)]
    sizes = {"N_SLOTS": n_slots, "SEARCHED": searched, "BLOCK": min(BLOCK, searched)}
    for first in range(0, length, chunk):
        n_rows = min(chunk, length - first)
        n_keys = key_length - length + first + n_rows
        group = triton.next_power_of_2(triton.cdiv(n_keys, searched))  # as few keys as leave maxima to be searched
        sizes_of_chunk = (length, key_length, stride, first, n_rows)
        if n_keys > n_slots:  # else everything is chosen
            write_scores(
                *(q, k, w, starts, keys, maxima, sizes_of_chunk, n_keys),
                searched=searched,
                group=group,
                forced_first=forced_first,
                forced_local=forced_local,
            )
        if group > 1:
            rows = (keys, maxima, starts, bounds, counts, candidates)
            _thin_kernel[(n_rows, batch)](*rows, *sizes_of_chunk, **sizes, GROUP=group, num_warps=WARPS)
        for fewer, size in ranges:
            if fewer < n_keys:
                # Few rows have many candidates, and programs that would find nothing to do are not free.
                n_programs = n_rows if size == few else min(n_rows, PROGRAMS)
                _select_kernel[(n_programs, batch)](
                    keys,
                    bounds,
                    counts,
                    candidates,
                    starts,
                    indices,
                    *sizes_of_chunk,
                    **sizes,
                    IS_THINNED=is_thinned,
                    FEWER=fewer,
                    SIZE=size,
                    num_warps=WARPS,
                )
    return indices
