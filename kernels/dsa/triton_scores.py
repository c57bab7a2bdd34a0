"""The lightning indexer's scores in Triton, as whole numbers in the same order.

A program keeps a few queries, of all heads, and goes through a stretch of the keys: one product of a tile of keys with
all heads of all its queries, whose heads lie in the same thread, so that they are added up where they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_Q, TILE_K, WARPS, STAGES = 16, 64, 4, 3
"""Queries of a program, and keys that it takes at a time; its warps; tiles of keys that are loaded ahead."""

COLUMNS = 128
"""Heads times queries of one product."""

SPAN = 2048
"""Keys of a program."""

LEAST, MOST = tl.constexpr(-2147483648), tl.constexpr(2147483647)
"""What stands for no key, and for a forced one."""


@triton.jit
def _queries(
    q,
    w,
    token_rows,
    is_row,
    first_head,
    N_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Tile (HEADS * BLOCK_Q, BLOCK_WIDTH) of queries, heads outside, and half their weights (HEADS * BLOCK_Q,)."""
    heads = first_head + tl.arange(0, HEADS)
    is_head = (heads < N_HEADS)[:, None] & is_row[None, :]
    head_rows = tl.reshape(token_rows[None, :] * N_HEADS + heads[:, None], [HEADS * BLOCK_Q])
    is_head = tl.reshape(is_head, [HEADS * BLOCK_Q])
    channels = tl.arange(0, BLOCK_WIDTH)
    mask = is_head[:, None] & (channels < WIDTH)[None, :]
    q_tile = tl.load(q + head_rows[:, None] * WIDTH + channels[None, :], mask=mask, other=0.0)
    return q_tile, tl.load(w + head_rows, mask=is_head, other=0.0).to(tl.float32) * 0.5


@triton.jit
def _sum_of_heads(
    k_tile, q_tile, halves, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """(BLOCK_K, BLOCK_Q): the sum over heads of weight times ReLU(k . q)."""
    product = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
    part = halves[None, :] * (product + tl.abs(product))  # as ReLU, on the units that multiply
    return tl.sum(tl.reshape(part, [BLOCK_K, HEADS, BLOCK_Q]), axis=1)


@triton.jit
def score_kernel(
    q,  # (B, L, J, E)
    k,  # (B, Lk, E)
    w,  # (B, L, J)
    starts,  # (B, L)
    keys,  # (B, n_rows, stride) int32: sortable
    maxima,  # (B, n_rows, SEARCHED) int32: the greatest of every GROUP keys, unless that is 1
    length,
    key_length,  # Lk, of whose keys the last L are the queries' own
    stride,  # at least Lk
    first,  # query of the chunk
    n_rows,
    forced_local,
    FORCED_FIRST: tl.constexpr,
    N_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HEADS: tl.constexpr,  # of one product
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    SEARCHED: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of a tile of queries and a span of keys."""
    row, span, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_row = rows < n_rows
    token_rows = batch.to(tl.int64) * length + first + rows
    chunk_rows = (batch.to(tl.int64) * n_rows + rows)[None, :]
    own = key_length - length + first + rows
    start = tl.load(starts + token_rows, mask=is_row, other=0)
    last_own = key_length - length + first + tl.minimum(row * BLOCK_Q + BLOCK_Q, n_rows) - 1
    first_own = key_length - length + first + row * BLOCK_Q
    first_token = batch.to(tl.int64) * length + first + row * BLOCK_Q
    first_start, last_start = tl.load(starts + first_token), tl.load(starts + first_token + last_own - first_own)
    # Tiles that nobody sees are not computed; what stands there is never used.
    span_stop = tl.minimum(span * SPAN + SPAN, last_own + 1)
    span_start = span * SPAN + tl.maximum(first_start - span * SPAN, 0) // BLOCK_K * BLOCK_K
    channels = tl.arange(0, BLOCK_WIDTH)
    if span_start < span_stop:
        q_tile, halves = _queries(q, w, token_rows, is_row, 0, N_HEADS, WIDTH, BLOCK_WIDTH, HEADS, BLOCK_Q)
        offsets = tl.arange(0, BLOCK_K)[:, None]
        for place in range(span_start, span_stop, BLOCK_K):
            key_rows = batch.to(tl.int64) * key_length + place + tl.arange(0, BLOCK_K)
            mask = (offsets < key_length - place) & (channels < WIDTH)[None, :]
            k_tile = tl.load(k + key_rows[:, None] * WIDTH + channels[None, :], mask=mask, other=0.0)
            score = _sum_of_heads(k_tile, q_tile, halves, HEADS, BLOCK_Q, BLOCK_K, PRECISION)
            for head in tl.range(HEADS, N_HEADS, HEADS, num_stages=1):
                q_more, more = _queries(q, w, token_rows, is_row, head, N_HEADS, WIDTH, BLOCK_WIDTH, HEADS, BLOCK_Q)
                score += _sum_of_heads(k_tile, q_more, more, HEADS, BLOCK_Q, BLOCK_K, PRECISION)
            key = (score + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
            key = key ^ ((key >> 31) & 0x7FFFFFFF)  # the order of floats as that of whole numbers
            if (place <= last_start) | (place + BLOCK_K > first_own - forced_local + 1):
                own_offset, start_offset = (own - place)[None, :], (start - place)[None, :]
                forced = offsets > own_offset - forced_local
                if FORCED_FIRST:
                    forced = forced | (offsets == start_offset)
                key = tl.where(forced, MOST, key)
                key = tl.where((offsets <= own_offset) & (offsets >= start_offset), key, LEAST)
            key_rows = keys + chunk_rows * stride + place
            tl.store(key_rows + offsets, key, mask=(offsets < stride - place) & is_row[None, :])
            if GROUP > 1:
                greatest = tl.max(tl.reshape(key, [BLOCK_K // GROUP, GROUP, BLOCK_Q]), axis=1)
                groups = place // GROUP + tl.arange(0, BLOCK_K // GROUP)[:, None]
                tl.store(maxima + chunk_rows * SEARCHED + groups, greatest, mask=(groups < SEARCHED) & is_row[None, :])


def write_scores(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    starts: Tensor,
    keys: Tensor,
    maxima: Tensor,
    chunk: tuple[int, int, int, int, int],
    n_keys: int,
    *,
    searched: int,
    group: int,
    forced_first: bool,
    forced_local: int,
) -> None:
    """Fill ``keys`` and ``maxima`` for a chunk of queries, which see the first ``n_keys`` keys.

    The rest as in the kernel; ``chunk`` is its (length, key_length, stride, first, n_rows).
    """
    *_, n_rows = chunk
    n_heads, width = q.shape[2:]
    block_width = max(16, triton.next_power_of_2(width))
    # Else tiles that are loaded ahead would not fit into shared memory.
    is_small = n_heads <= COLUMNS // TILE_Q and block_width * q.element_size() <= 256
    tile_k = max(TILE_K, group)
    grid = (triton.cdiv(n_rows, TILE_Q), triton.cdiv(n_keys, max(SPAN, tile_k)), q.shape[0])
    score_kernel[grid](
        q,
        k,
        w,
        starts,
        keys,
        maxima,
        *chunk,
        forced_local,
        FORCED_FIRST=forced_first,
        N_HEADS=n_heads,
        WIDTH=width,
        BLOCK_WIDTH=block_width,
        HEADS=min(triton.next_power_of_2(n_heads), COLUMNS // TILE_Q),
        BLOCK_Q=TILE_Q,
        BLOCK_K=tile_k,
        SPAN=max(SPAN, tile_k),
        SEARCHED=searched,
        GROUP=group,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=WARPS,
        num_stages=STAGES if is_small else 1,
    )
