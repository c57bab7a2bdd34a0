"""The indexer's KL over all earlier keys and its gradient, for the dense warm-up, in Triton.

Tiles of scores and of attention probabilities are written for a chunk of queries at a time (`CHUNK_NUMBERS` of each),
whose softmax and divergence are torch's business; then the gradient of the scores goes back to q^I, w (a program per
tile of queries and index head) and k^I (a program per tile of keys, chunk after chunk: no atomics).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt2titan.kernels.dsa.reference import document_starts
from lt2titan.kernels.dsa.triton_attention import precision

CHUNK_NUMBERS = 1 << 25
"""Scores that exist at a time: 128 MB, and as much of each of the few tensors made of them."""

BLOCK = 64


@triton.jit
def _lse_kernel(
    q,  # (B, L, H, D)
    k,  # (B, Lk, Hkv, D)
    starts,  # (B, L)
    lse,  # (B, L, H)
    scale,
    length,
    key_length,  # Lk, of whose keys the last L are the queries' own
    N_KV: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The log of the sum of exponentials of a tile of queries and one head."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base, key_base = batch.to(tl.int64) * length, batch.to(tl.int64) * key_length
    channels = tl.arange(0, BLOCK_WIDTH)
    is_channel = channels < WIDTH
    tokens = tile * BLOCK + tl.arange(0, BLOCK)
    own = key_length - length + tokens
    is_token = tokens < length
    start = tl.load(starts + base + tokens, mask=is_token, other=0)
    rows = (base + tokens) * (N_KV * GROUP) + head
    q_tile = tl.load(q + rows[:, None] * WIDTH + channels, mask=is_token[:, None] & is_channel[None, :], other=0.0)
    greatest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    first = tl.load(starts + base + tile * BLOCK) // BLOCK * BLOCK
    for place in range(first, tl.minimum(key_length - length + tile * BLOCK + BLOCK, key_length), BLOCK):
        places = place + tl.arange(0, BLOCK)
        key_rows = (key_base + places) * N_KV + head // GROUP
        k_tile = tl.load(
            k + key_rows[:, None] * WIDTH + channels,
            mask=(places < key_length)[:, None] & is_channel[None, :],
            other=0.0,
        )
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        seen = (places[None, :] <= own[:, None]) & (places[None, :] >= start[:, None])
        score = tl.where(seen, score, float("-inf"))
        # A document's first tile may have nothing for some of these queries yet.
        new_greatest = tl.maximum(tl.maximum(greatest, tl.max(score, axis=1)), -1e30)
        total = total * tl.exp(greatest - new_greatest) + tl.sum(tl.exp(score - new_greatest[:, None]), axis=1)
        greatest = new_greatest
    tl.store(lse + rows, greatest + tl.log(total), mask=is_token)


@triton.jit
def _tile_kernel(
    index_q,  # (B, L, J, E)
    index_k,  # (B, Lk, E)
    w,  # (B, L, J)
    q,  # (B, L, H, D)
    k,  # (B, Lk, Hkv, D)
    lse,  # (B, L, H)
    starts,  # (B, L)
    scores,  # (B, n_rows, n_keys) fp32
    target,  # (B, n_rows, n_keys) fp32
    scale,
    length,
    key_length,  # Lk, of whose keys the last L are the queries' own
    first,
    n_rows,
    n_keys,
    N_KV: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    N_INDEX: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    BLOCK_INDEX_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores (-inf where a key is not seen) and head-averaged probabilities of a tile of queries and keys."""
    row, column, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base, key_base = batch.to(tl.int64) * length, batch.to(tl.int64) * key_length
    rows = row * BLOCK + tl.arange(0, BLOCK)
    tokens, places = first + rows, column * BLOCK + tl.arange(0, BLOCK)
    own = key_length - length + tokens
    is_row, is_key = rows < n_rows, places < n_keys
    start = tl.load(starts + base + tokens, mask=is_row, other=0)
    seen = (places[None, :] <= own[:, None]) & (places[None, :] >= start[:, None])
    score = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    mass = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    last_own = key_length - length + first + tl.minimum(row * BLOCK + BLOCK, n_rows) - 1
    if (column * BLOCK <= last_own) & (column * BLOCK + BLOCK > tl.load(starts + base + first + row * BLOCK)):
        e, channels = tl.arange(0, BLOCK_INDEX_WIDTH), tl.arange(0, BLOCK_WIDTH)
        is_e, is_channel = e < INDEX_WIDTH, channels < WIDTH
        ik = tl.load(
            index_k + (key_base + places)[:, None] * INDEX_WIDTH + e, mask=is_key[:, None] & is_e[None, :], other=0.0
        )
        for j in range(N_INDEX):
            index_rows = (base + tokens) * N_INDEX + j
            iq = tl.load(
                index_q + index_rows[:, None] * INDEX_WIDTH + e, mask=is_row[:, None] & is_e[None, :], other=0.0
            )
            weight = tl.load(w + index_rows, mask=is_row, other=0.0).to(tl.float32)
            score += weight[:, None] * tl.maximum(tl.dot(iq, tl.trans(ik), input_precision=PRECISION), 0.0)
        for head in range(N_KV * GROUP):
            head_rows = (base + tokens) * (N_KV * GROUP) + head
            q_tile = tl.load(
                q + head_rows[:, None] * WIDTH + channels, mask=is_row[:, None] & is_channel[None, :], other=0.0
            )
            key_rows = (key_base + places) * N_KV + head // GROUP
            k_tile = tl.load(
                k + key_rows[:, None] * WIDTH + channels, mask=is_key[:, None] & is_channel[None, :], other=0.0
            )
            lse_row = tl.load(lse + head_rows, mask=is_row, other=0.0)
            product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
            mass += tl.where(seen, tl.exp(product - lse_row[:, None]), 0.0)
    out = (batch.to(tl.int64) * n_rows + rows)[:, None] * n_keys + places[None, :]
    is_entry = is_row[:, None] & is_key[None, :]
    tl.store(scores + out, tl.where(seen, score, float("-inf")), mask=is_entry)
    tl.store(target + out, mass / (N_KV * GROUP), mask=is_entry)


@triton.jit
def _queries_kernel(
    index_q,  # (B, L, J, E)
    index_k,  # (B, Lk, E)
    w,  # (B, L, J)
    d_scores,  # (B, n_rows, n_keys) fp32
    starts,  # (B, L)
    d_index_q,  # (B, L, J, E)
    dw,  # (B, L, J)
    length,
    key_length,
    first,
    n_rows,
    n_keys,
    N_INDEX: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    BLOCK_INDEX_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of q^I and w of a tile of queries and one index head."""
    row, j, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base, key_base = batch.to(tl.int64) * length, batch.to(tl.int64) * key_length
    e = tl.arange(0, BLOCK_INDEX_WIDTH)
    is_e = e < INDEX_WIDTH
    rows = row * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < n_rows
    index_rows = (base + first + rows) * N_INDEX + j
    at_index = index_rows[:, None] * INDEX_WIDTH + e
    iq = tl.load(index_q + at_index, mask=is_row[:, None] & is_e[None, :], other=0.0)
    weight = tl.load(w + index_rows, mask=is_row, other=0.0).to(tl.float32)
    result = tl.zeros([BLOCK, BLOCK_INDEX_WIDTH], dtype=tl.float32)
    d_weight = tl.zeros([BLOCK], dtype=tl.float32)
    first_place = tl.load(starts + base + first + row * BLOCK) // BLOCK * BLOCK
    for place in range(first_place, tl.minimum(key_length - length + first + row * BLOCK + BLOCK, n_keys), BLOCK):
        places = place + tl.arange(0, BLOCK)
        is_key = places < n_keys
        ik = tl.load(
            index_k + (key_base + places)[:, None] * INDEX_WIDTH + e, mask=is_key[:, None] & is_e[None, :], other=0.0
        )
        at_scores = (batch.to(tl.int64) * n_rows + rows)[:, None] * n_keys + places[None, :]
        d_score = tl.load(d_scores + at_scores, mask=is_row[:, None] & is_key[None, :], other=0.0)
        product = tl.maximum(tl.dot(iq, tl.trans(ik), input_precision=PRECISION), 0.0)
        d_weight += tl.sum(d_score * product, axis=1)
        d_product = tl.where(product > 0.0, d_score * weight[:, None], 0.0).to(ik.dtype)
        result += tl.dot(d_product, ik, input_precision=PRECISION)
    tl.store(d_index_q + at_index, result.to(d_index_q.dtype.element_ty), mask=is_row[:, None] & is_e[None, :])
    tl.store(dw + index_rows, d_weight.to(dw.dtype.element_ty), mask=is_row)


@triton.jit
def _keys_kernel(
    index_q,  # (B, L, J, E)
    index_k,  # (B, Lk, E)
    w,  # (B, L, J)
    d_scores,  # (B, n_rows, n_keys) fp32
    d_index_k,  # (B, Lk, E) fp32, added to
    length,
    key_length,
    first,
    n_rows,
    n_keys,
    N_INDEX: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    BLOCK_INDEX_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a chunk of queries adds to the gradient of a tile of keys."""
    column, batch = tl.program_id(0), tl.program_id(1)
    base, key_base = batch.to(tl.int64) * length, batch.to(tl.int64) * key_length
    e = tl.arange(0, BLOCK_INDEX_WIDTH)
    is_e = e < INDEX_WIDTH
    places = column * BLOCK + tl.arange(0, BLOCK)
    is_key = places < n_keys
    at_keys = (key_base + places)[:, None] * INDEX_WIDTH + e
    is_entry = is_key[:, None] & is_e[None, :]
    ik = tl.load(index_k + at_keys, mask=is_entry, other=0.0)
    result = tl.load(d_index_k + at_keys, mask=is_entry, other=0.0)
    for row in range(tl.maximum(column * BLOCK - (key_length - length) - first, 0) // BLOCK * BLOCK, n_rows, BLOCK):
        rows = row + tl.arange(0, BLOCK)
        is_row = rows < n_rows
        at_scores = (batch.to(tl.int64) * n_rows + rows)[:, None] * n_keys + places[None, :]
        d_score = tl.load(d_scores + at_scores, mask=is_row[:, None] & is_key[None, :], other=0.0)
        for j in range(N_INDEX):
            index_rows = (base + first + rows) * N_INDEX + j
            iq = tl.load(
                index_q + index_rows[:, None] * INDEX_WIDTH + e, mask=is_row[:, None] & is_e[None, :], other=0.0
            )
            weight = tl.load(w + index_rows, mask=is_row, other=0.0).to(tl.float32)
            product = tl.dot(iq, tl.trans(ik), input_precision=PRECISION)
            d_product = tl.where(product > 0.0, d_score * weight[:, None], 0.0).to(iq.dtype)
            result += tl.dot(tl.trans(d_product), iq, input_precision=PRECISION)
    tl.store(d_index_k + at_keys, result, mask=is_entry)


def kl_dense(
    index_q: Tensor, index_k: Tensor, w: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `kl_reference.kl_dense_reference`."""
    index_q, index_k, w, q, k = (x.contiguous() for x in (index_q, index_k, w, q, k))
    (batch, length, n_index, index_width), key_length = index_q.shape, k.shape[1]
    starts = document_starts(batch, length, key_length, cu_seqlens, q.device).int()
    heads = {
        "N_KV": k.shape[2],
        "GROUP": q.shape[2] // k.shape[2],
        "WIDTH": q.shape[3],
        "BLOCK_WIDTH": max(16, triton.next_power_of_2(q.shape[3])),
    }
    index_heads = {
        "N_INDEX": n_index,
        "INDEX_WIDTH": index_width,
        "BLOCK_INDEX_WIDTH": max(16, triton.next_power_of_2(index_width)),
    }
    options = {"BLOCK": BLOCK, "PRECISION": precision(q), "num_warps": 4}
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    _lse_kernel[(triton.cdiv(length, BLOCK), q.shape[2], batch)](
        q, k, starts, lse, scale, length, key_length, **heads, **options
    )
    d_index_q, dw = torch.empty_like(index_q), torch.empty_like(w)
    d_index_k = torch.zeros(index_k.shape, dtype=torch.float32, device=q.device)
    kl = torch.zeros((), dtype=torch.float32, device=q.device)
    chunk = max(1, min(length, CHUNK_NUMBERS // (batch * key_length)))
    for first in range(0, length, chunk):
        n_rows = min(chunk, length - first)
        n_keys = key_length - length + first + n_rows
        scores, target = torch.empty(2, batch, n_rows, n_keys, dtype=torch.float32, device=q.device)
        place = (length, key_length, first, n_rows, n_keys)
        n_row_tiles, n_key_tiles = triton.cdiv(n_rows, BLOCK), triton.cdiv(n_keys, BLOCK)
        _tile_kernel[(n_row_tiles, n_key_tiles, batch)](
            index_q, index_k, w, q, k, lse, starts, scores, target, scale, *place, **heads, **index_heads, **options
        )
        log_q = scores.log_softmax(dim=-1)
        gap = torch.where(target > 0, target.clamp(min=1e-30).log() - log_q, 0.0)
        kl += (target * gap).sum()
        d_scores = log_q.exp_().sub_(target)
        _queries_kernel[(n_row_tiles, n_index, batch)](
            index_q, index_k, w, d_scores, starts, d_index_q, dw, *place, **index_heads, **options
        )
        _keys_kernel[(n_key_tiles, batch)](index_q, index_k, w, d_scores, d_index_k, *place, **index_heads, **options)
    return kl, d_index_q, d_index_k.to(index_k.dtype), dw
