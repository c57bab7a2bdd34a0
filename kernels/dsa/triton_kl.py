"""The indexer's KL over selected keys and its gradient in Triton: a program per query, which reads its keys twice, for
the softmax's denominator first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt2titan.kernels.dsa.inverse import inverse_chunks
from lt2titan.kernels.dsa.triton_attention import block_group, count_keys, precision, sizes


@triton.jit
def _kl_kernel(
    index_q,  # (B, L, J, E)
    index_k,  # (B, Lk, E)
    w,  # (B, L, J)
    q,  # (B, L, H, D)
    k,  # (B, Lk, Hkv, D)
    lse,  # (B, L, H)
    indices,  # (B, L, N_SLOTS)
    counts,  # (B, L)
    kl,  # (B, L)
    d_index_q,  # (B, L, J, E)
    d_index_k,  # (B, Lk, E) fp32
    dw,  # (B, L, J)
    d_scores,  # (B, L, N_SLOTS) fp32, written unless ADDS_KEYS
    scale,
    length,
    key_length,
    N_KV: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    N_INDEX: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    N_SLOTS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_INDEX: tl.constexpr,
    BLOCK_INDEX_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One query."""
    token, batch = tl.program_id(0), tl.program_id(1)
    base = batch.to(tl.int64) * key_length
    row = batch.to(tl.int64) * length + token
    heads, channels = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_WIDTH)
    is_head, is_channel = heads < GROUP, channels < WIDTH
    j, e = tl.arange(0, BLOCK_INDEX), tl.arange(0, BLOCK_INDEX_WIDTH)
    is_j, is_e = j < N_INDEX, e < INDEX_WIDTH
    index_rows = row * N_INDEX + j
    at_index = index_rows[:, None] * INDEX_WIDTH + e
    own = is_j[:, None] & is_e[None, :]
    iq = tl.load(index_q + at_index, mask=own, other=0.0)
    weight = tl.load(w + index_rows, mask=is_j, other=0.0).to(tl.float32)
    count = tl.load(counts + row)

    greatest = tl.full([1], float("-inf"), dtype=tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    for slot in range(0, count, BLOCK):
        slots = slot + tl.arange(0, BLOCK)
        is_key = slots < count
        places = tl.load(indices + row * N_SLOTS + slots, mask=is_key, other=0)
        at_keys = (base + places)[:, None] * INDEX_WIDTH + e
        ik = tl.load(index_k + at_keys, mask=is_key[:, None] & is_e[None, :], other=0.0)
        product = tl.maximum(tl.dot(iq, tl.trans(ik), input_precision=PRECISION), 0.0)
        score = tl.where(is_key, tl.sum(weight[:, None] * product, axis=0), float("-inf"))
        new_greatest = tl.maximum(greatest, tl.max(score, axis=0))
        total = total * tl.exp(greatest - new_greatest) + tl.sum(tl.exp(score - new_greatest), axis=0)
        greatest = new_greatest
    log_total = greatest + tl.log(total)

    divergence = tl.zeros([BLOCK], dtype=tl.float32)
    d_iq = tl.zeros([BLOCK_INDEX, BLOCK_INDEX_WIDTH], dtype=tl.float32)
    d_weight = tl.zeros([BLOCK_INDEX], dtype=tl.float32)
    for slot in range(0, count, BLOCK):
        slots = slot + tl.arange(0, BLOCK)
        is_key = slots < count
        places = tl.load(indices + row * N_SLOTS + slots, mask=is_key, other=0)
        target = tl.zeros([BLOCK], dtype=tl.float32)
        for kv in range(N_KV):
            head_rows = (row * N_KV + kv) * GROUP + heads
            at_heads = head_rows[:, None] * WIDTH + channels
            q_tile = tl.load(q + at_heads, mask=is_head[:, None] & is_channel[None, :], other=0.0)
            lse_row = tl.load(lse + head_rows, mask=is_head, other=0.0)
            at_heads_keys = ((base + places) * N_KV + kv)[:, None] * WIDTH + channels
            k_tile = tl.load(k + at_heads_keys, mask=is_key[:, None] & is_channel[None, :], other=0.0)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
            target += tl.sum(tl.where(is_head[:, None], tl.exp(s - lse_row[:, None]), 0.0), axis=0)
        target = tl.where(is_key, target / (N_KV * GROUP), 0.0)
        at_keys = (base + places)[:, None] * INDEX_WIDTH + e
        is_entry = is_key[:, None] & is_e[None, :]
        ik = tl.load(index_k + at_keys, mask=is_entry, other=0.0)
        product = tl.maximum(tl.dot(iq, tl.trans(ik), input_precision=PRECISION), 0.0)
        log_q = tl.where(is_key, tl.sum(weight[:, None] * product, axis=0) - log_total, 0.0)
        divergence += tl.where(target > 0.0, target * (tl.log(tl.maximum(target, 1e-30)) - log_q), 0.0)
        d_score = tl.where(is_key, tl.exp(log_q) - target, 0.0)
        d_weight += tl.sum(d_score[None, :] * product, axis=1)
        d_product = tl.where(product > 0.0, d_score[None, :] * weight[:, None], 0.0).to(ik.dtype)
        d_iq += tl.dot(d_product, ik, input_precision=PRECISION)
        if ADDS_KEYS:
            d_ik = tl.dot(tl.trans(d_product), iq, input_precision=PRECISION)
            tl.atomic_add(d_index_k + at_keys, d_ik, mask=is_entry, sem="relaxed")
        else:
            tl.store(d_scores + row * N_SLOTS + slots, d_score, mask=is_key)
    tl.store(kl + row, tl.sum(divergence, axis=0))
    tl.store(d_index_q + at_index, d_iq.to(d_index_q.dtype.element_ty), mask=own)
    tl.store(dw + index_rows, d_weight.to(dw.dtype.element_ty), mask=is_j)


@triton.jit
def _keys_kernel(
    index_q,  # (B, L, J, E)
    index_k,  # (B, Lk, E)
    w,  # (B, L, J)
    d_scores,  # (B, L, N_SLOTS), flattened
    queries,  # (n,), bounds (B Lk + 1,), slots (n,): see inverse.py
    bounds,
    slots,
    d_index_k,  # (B, Lk, E) fp32, added to
    N_INDEX: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    BLOCK_INDEX_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one key, in the order of the queries: BLOCK rows of (query, index head) at a time."""
    key = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_INDEX_WIDTH)
    is_e = e < INDEX_WIDTH
    ik = tl.load(index_k + key * INDEX_WIDTH + e, mask=is_e, other=0.0).to(tl.float32)
    result = tl.load(d_index_k + key * INDEX_WIDTH + e, mask=is_e, other=0.0)
    first = tl.load(bounds + key)
    n_pairs = (tl.load(bounds + key + 1) - first) * N_INDEX
    for pair in range(0, n_pairs, BLOCK):
        pairs = pair + tl.arange(0, BLOCK)
        is_pair = pairs < n_pairs
        row = tl.load(queries + first + pairs // N_INDEX, mask=is_pair, other=0).to(tl.int64)
        index_rows = row * N_INDEX + pairs % N_INDEX
        at_index = index_rows[:, None] * INDEX_WIDTH + e
        iq = tl.load(index_q + at_index, mask=is_pair[:, None] & is_e[None, :], other=0.0).to(tl.float32)
        weight = tl.load(w + index_rows, mask=is_pair, other=0.0).to(tl.float32)
        slot = tl.load(slots + first + pairs // N_INDEX, mask=is_pair, other=0)
        d_score = tl.load(d_scores + slot, mask=is_pair, other=0.0)
        d_product = tl.where(tl.sum(iq * ik[None, :], axis=1) > 0.0, d_score * weight, 0.0)
        result += tl.sum(d_product[:, None] * iq, axis=0)
    tl.store(d_index_k + key * INDEX_WIDTH + e, result, mask=is_e)


def kl_selected(
    index_q: Tensor,
    index_k: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    lse: Tensor,
    scale: float,
    is_deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `kl_reference.kl_selected_reference`."""
    index_q, index_k, w, q, k, indices, lse = (x.contiguous() for x in (index_q, index_k, w, q, k, indices, lse))
    batch, length, n_index, index_width = index_q.shape
    kl = torch.empty(batch, length, dtype=torch.float32, device=q.device)
    d_index_k = torch.zeros(index_k.shape, dtype=torch.float32, device=q.device)
    d_index_q, dw = torch.empty_like(index_q), torch.empty_like(w)
    d_scores = kl.new_empty(indices.shape if is_deterministic else (1,))
    index_sizes = {
        "N_INDEX": n_index,
        "INDEX_WIDTH": index_width,
        "BLOCK_INDEX_WIDTH": max(16, triton.next_power_of_2(index_width)),
    }
    _kl_kernel[(length, batch)](
        index_q,
        index_k,
        w,
        q,
        k,
        lse,
        indices,
        count_keys(indices),
        kl,
        d_index_q,
        d_index_k,
        dw,
        d_scores,
        scale,
        length,
        k.shape[1],
        **sizes(q, k),
        **index_sizes,
        N_SLOTS=indices.shape[2],
        BLOCK_GROUP=block_group(q, k),
        BLOCK_INDEX=max(16, triton.next_power_of_2(n_index)),
        BLOCK=64 if q.element_size() == 2 else 32,
        ADDS_KEYS=not is_deterministic,
        PRECISION=precision(q),
        num_warps=4,
    )
    if is_deterministic:
        for queries, bounds, slots in inverse_chunks(indices, k.shape[1]):
            _keys_kernel[(batch * k.shape[1],)](
                index_q, index_k, w, d_scores, queries, bounds, slots, d_index_k, **index_sizes, BLOCK=32, num_warps=2
            )
    return kl.sum(), d_index_q, d_index_k.to(index_k.dtype), dw
