"""Index scores and the choice of the greatest, in Triton.

Scores exist for a chunk of queries at a time (`CHUNK_NUMBERS` of them), as whole numbers in the same order, so that a
selection is an exact radix select: four passes of eight bits over a row find the least key that is chosen, and how many
of those equal to it; a fifth writes places in ascending order, which lets the earlier of equal keys win.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt2titan.kernels.dsa.reference import document_starts

CHUNK_NUMBERS = 1 << 26
"""Scores that exist at a time: 256 MB, whatever the length."""

TILE = 64
"""Queries, and keys, of a program that computes scores."""


@triton.jit
def _order_kernel(
    q,  # (B, L, J, E)
    k,  # (B, Lk, E)
    w,  # (B, L, J)
    starts,  # (B, L)
    keys,  # (B, n_rows, n_keys) int32: sortable
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
        out = (batch.to(tl.int64) * n_rows + rows)[:, None] * n_keys + places[None, :]
        tl.store(keys + out, key, mask=is_row[:, None] & is_key[None, :])


@triton.jit
def _select_kernel(
    keys,  # (B, n_rows, n_keys) int32
    starts,  # (B, L)
    indices,  # (B, L, N_SLOTS) int32
    length,
    key_length,
    first,
    n_rows,
    n_keys,
    N_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """The selection of one query."""
    row, batch = tl.program_id(0), tl.program_id(1)
    token_row = batch.to(tl.int64) * length + first + row
    own = key_length - length + first + row
    start = tl.load(starts + token_row).to(tl.int32)
    out = indices + token_row * N_SLOTS
    n_seen = own + 1 - start
    if n_seen <= N_SLOTS:
        for slot in range(0, N_SLOTS, BLOCK_SLOTS):
            slots = slot + tl.arange(0, BLOCK_SLOTS)
            tl.store(out + slots, tl.where(slots < n_seen, start + slots, -1), mask=slots < N_SLOTS)
    else:
        key_row = keys + (batch.to(tl.int64) * n_rows + row) * n_keys
        bins = tl.arange(0, 256)
        least = 0  # the leading bits of the least chosen key, as an unsigned number in the same order
        n_wanted = N_SLOTS  # of the keys that have these leading bits
        for digit in tl.static_range(4):
            shift = 24 - 8 * digit
            counts = tl.zeros([256], dtype=tl.int32)
            for place in range(start, own + 1, BLOCK):
                places = place + tl.arange(0, BLOCK)
                seen = places <= own
                key = tl.load(key_row + places, mask=seen, other=0)
                bits = key.to(tl.uint32, bitcast=True) ^ 0x80000000
                if digit > 0:
                    leading = least.to(tl.uint32, bitcast=True) >> (shift + 8)  # type: ignore[attr-defined]
                    seen = seen & ((bits >> (shift + 8)) == leading)
                value = ((bits >> shift) & 255).to(tl.int32)
                counts += tl.histogram(value, 256, mask=seen)
            n_from = tl.cumsum(counts, axis=0, reverse=True)  # keys whose digit is at least this
            is_least = (n_from >= n_wanted) & (n_from - counts < n_wanted)
            n_wanted -= tl.sum(tl.where(is_least, n_from - counts, 0))
            least = least | (tl.sum(tl.where(is_least, bins, 0)) << shift)
        least_key = least ^ (-2147483648)
        n_written = 0
        n_ties = 0
        for place in range(start, own + 1, BLOCK):
            places = place + tl.arange(0, BLOCK)
            seen = places <= own
            key = tl.load(key_row + places, mask=seen, other=0)
            is_tie = (seen & (key == least_key)).to(tl.int32)
            rank = n_ties + tl.cumsum(is_tie, axis=0)
            chosen = (seen & (key > least_key)) | ((is_tie > 0) & (rank <= n_wanted))
            chosen_number = chosen.to(tl.int32)
            slots = n_written + tl.cumsum(chosen_number, axis=0) - 1
            tl.store(out + slots, places, mask=chosen)
            n_written += tl.sum(chosen_number)
            n_ties += tl.sum(is_tie)


def select(
    q: Tensor, k: Tensor, w: Tensor, cu_seqlens: Tensor | None, top_k: int, forced_first: bool, forced_local: int
) -> Tensor:
    """As `reference.select_reference`."""
    q, k, w = q.contiguous(), k.contiguous(), w.contiguous()
    (batch, length, n_heads, width), key_length = q.shape, k.shape[1]
    n_slots = min(top_k, key_length)
    starts = document_starts(batch, length, key_length, cu_seqlens, q.device).int()
    indices = torch.empty(batch, length, n_slots, dtype=torch.int32, device=q.device)
    chunk = max(1, min(length, CHUNK_NUMBERS // (batch * key_length)))
    keys = torch.empty(batch * chunk * key_length, dtype=torch.int32, device=q.device)
    for first in range(0, length, chunk):
        n_rows = min(chunk, length - first)
        n_keys = key_length - length + first + n_rows
        # Chunks of queries that all see no more than there are slots need no scores; with documents nobody knows.
        if cu_seqlens is not None or n_keys > n_slots:
            grid = (triton.cdiv(n_rows, TILE), triton.cdiv(n_keys, TILE), batch)
            _order_kernel[grid](
                q,
                k,
                w,
                starts,
                keys,
                length,
                key_length,
                first,
                n_rows,
                n_keys,
                forced_local,
                FORCED_FIRST=forced_first,
                N_HEADS=n_heads,
                WIDTH=width,
                BLOCK_WIDTH=max(16, triton.next_power_of_2(width)),
                BLOCK_Q=TILE,
                BLOCK_K=TILE,
                PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
                num_warps=4,
            )
        _select_kernel[(n_rows, batch)](
            keys,
            starts,
            indices,
            length,
            key_length,
            first,
            n_rows,
            n_keys,
            N_SLOTS=n_slots,
            BLOCK=min(2048, max(128, triton.next_power_of_2(key_length))),
            BLOCK_SLOTS=min(1024, triton.next_power_of_2(n_slots)),
            num_warps=8 if key_length >= 2048 else 4,
        )
    return indices
