"""Softmax attention over selected keys in Triton: a program per query (and key head), all of whose query heads share
the keys that it gathers.

Backward, gradients of keys and values are added up by fp32 atomics, or, if asked to be deterministic, by a program per
key that walks over the queries that chose it, in their order (see inverse.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt2titan.kernels.dsa.inverse import inverse_chunks


@triton.jit
def _forward_kernel(
    q,  # (B, L, H, D)
    k,  # (B, Lk, Hkv, D)
    v,  # (B, Lk, Hkv, D)
    indices,  # (B, L, N_SLOTS)
    counts,  # (B, L)
    o,  # (B, L, H, D)
    lse,  # (B, L, H)
    scale,
    length,
    key_length,
    N_KV: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    N_SLOTS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The heads of one group of one query."""
    token, kv, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = batch.to(tl.int64) * length + token
    heads, channels = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_WIDTH)
    is_head, is_channel = heads < GROUP, channels < WIDTH
    own = is_head[:, None] & is_channel[None, :]
    head_rows = (row * N_KV + kv) * GROUP + heads
    q_tile = tl.load(q + head_rows[:, None] * WIDTH + channels, mask=own, other=0.0)
    greatest = tl.full([BLOCK_GROUP], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_GROUP], dtype=tl.float32)
    result = tl.zeros([BLOCK_GROUP, BLOCK_WIDTH], dtype=tl.float32)
    count = tl.load(counts + row)
    for slot in range(0, count, BLOCK):
        slots = slot + tl.arange(0, BLOCK)
        is_key = slots < count
        places = tl.load(indices + row * N_SLOTS + slots, mask=is_key, other=0)
        key_rows = (batch.to(tl.int64) * key_length + places) * N_KV + kv
        is_entry = is_key[:, None] & is_channel[None, :]
        k_tile = tl.load(k + key_rows[:, None] * WIDTH + channels, mask=is_entry, other=0.0)
        v_tile = tl.load(v + key_rows[:, None] * WIDTH + channels, mask=is_entry, other=0.0)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        score = tl.where(is_key[None, :], score, float("-inf"))
        new_greatest = tl.maximum(greatest, tl.max(score, axis=1))
        shrink = tl.exp(greatest - new_greatest)
        p = tl.exp(score - new_greatest[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        result = result * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        greatest = new_greatest
    tl.store(o + head_rows[:, None] * WIDTH + channels, (result / total[:, None]).to(o.dtype.element_ty), mask=own)
    tl.store(lse + head_rows, greatest + tl.log(total), mask=is_head)


@triton.jit
def _backward_kernel(
    q,  # (B, L, H, D)
    k,  # (B, Lk, Hkv, D)
    v,
    indices,  # (B, L, N_SLOTS)
    counts,  # (B, L)
    lse,  # (B, L, H)
    delta,  # (B, L, H): do . o
    do,  # (B, L, H, D)
    dq,  # (B, L, H, D)
    dk,  # (B, Lk, Hkv, D) fp32
    dv,
    scale,
    length,
    key_length,
    N_KV: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    N_SLOTS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of the heads of one group of one query; with ADDS_KEYS what they add to dk and dv."""
    token, kv, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = batch.to(tl.int64) * length + token
    heads, channels = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_WIDTH)
    is_head, is_channel = heads < GROUP, channels < WIDTH
    own = is_head[:, None] & is_channel[None, :]
    head_rows = (row * N_KV + kv) * GROUP + heads
    at_heads = head_rows[:, None] * WIDTH + channels
    q_tile = tl.load(q + at_heads, mask=own, other=0.0)
    do_tile = tl.load(do + at_heads, mask=own, other=0.0)
    lse_row = tl.load(lse + head_rows, mask=is_head, other=0.0)
    delta_row = tl.load(delta + head_rows, mask=is_head, other=0.0)
    result = tl.zeros([BLOCK_GROUP, BLOCK_WIDTH], dtype=tl.float32)
    count = tl.load(counts + row)
    for slot in range(0, count, BLOCK):
        slots = slot + tl.arange(0, BLOCK)
        is_key = slots < count
        places = tl.load(indices + row * N_SLOTS + slots, mask=is_key, other=0)
        at_keys = ((batch.to(tl.int64) * key_length + places) * N_KV + kv)[:, None] * WIDTH + channels
        is_entry = is_key[:, None] & is_channel[None, :]
        k_tile = tl.load(k + at_keys, mask=is_entry, other=0.0)
        v_tile = tl.load(v + at_keys, mask=is_entry, other=0.0)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        p = tl.where(is_key[None, :] & is_head[:, None], tl.exp(score - lse_row[:, None]), 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = (p * (dp - delta_row[:, None]) * scale).to(k_tile.dtype)
        result += tl.dot(ds, k_tile, input_precision=PRECISION)
        if ADDS_KEYS:
            dk_tile = tl.dot(tl.trans(ds), q_tile, input_precision=PRECISION)
            dv_tile = tl.dot(tl.trans(p.to(do_tile.dtype)), do_tile, input_precision=PRECISION)
            tl.atomic_add(dk + at_keys, dk_tile, mask=is_entry, sem="relaxed")
            tl.atomic_add(dv + at_keys, dv_tile, mask=is_entry, sem="relaxed")
    tl.store(dq + at_heads, result.to(dq.dtype.element_ty), mask=own)


@triton.jit
def _keys_kernel(
    q,  # (B, L, H, D)
    k,  # (B, Lk, Hkv, D)
    v,
    queries,  # (n,): of each key in turn those that chose it, as rows of (B L)
    bounds,  # (B Lk + 1,): of each key's queries
    lse,  # (B, L, H)
    delta,
    do,  # (B, L, H, D)
    dk,  # (B, Lk, Hkv, D) fp32, added to
    dv,
    scale,
    N_KV: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dk and dv of one head of one key, in the order of the queries: BLOCK rows of (query, head) at a time."""
    key, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels = tl.arange(0, BLOCK_WIDTH)
    is_channel = channels < WIDTH
    at_key = (key * N_KV + kv) * WIDTH + channels
    k_row = tl.load(k + at_key, mask=is_channel, other=0.0).to(tl.float32)
    v_row = tl.load(v + at_key, mask=is_channel, other=0.0).to(tl.float32)
    dk_row = tl.load(dk + at_key, mask=is_channel, other=0.0)
    dv_row = tl.load(dv + at_key, mask=is_channel, other=0.0)
    first = tl.load(bounds + key)
    n_pairs = (tl.load(bounds + key + 1) - first) * GROUP
    for pair in range(0, n_pairs, BLOCK):
        pairs = pair + tl.arange(0, BLOCK)
        is_pair = pairs < n_pairs
        row = tl.load(queries + first + pairs // GROUP, mask=is_pair, other=0).to(tl.int64)
        head_rows = (row * N_KV + kv) * GROUP + pairs % GROUP
        at_heads = head_rows[:, None] * WIDTH + channels
        is_entry = is_pair[:, None] & is_channel[None, :]
        q_tile = tl.load(q + at_heads, mask=is_entry, other=0.0).to(tl.float32)
        do_tile = tl.load(do + at_heads, mask=is_entry, other=0.0).to(tl.float32)
        score = tl.sum(q_tile * k_row[None, :], axis=1) * scale
        p = tl.where(is_pair, tl.exp(score - tl.load(lse + head_rows, mask=is_pair, other=0.0)), 0.0)
        dp = tl.sum(do_tile * v_row[None, :], axis=1)
        ds = p * (dp - tl.load(delta + head_rows, mask=is_pair, other=0.0)) * scale
        dk_row += tl.sum(ds[:, None] * q_tile, axis=0)
        dv_row += tl.sum(p[:, None] * do_tile, axis=0)
    tl.store(dk + at_key, dk_row, mask=is_channel)
    tl.store(dv + at_key, dv_row, mask=is_channel)


def sizes(q: Tensor, k: Tensor) -> dict[str, int]:
    """Constants of the kernels that both of attention and of the KL take."""
    group, width = q.shape[2] // k.shape[2], q.shape[3]
    return {
        "N_KV": k.shape[2],
        "GROUP": group,
        "WIDTH": width,
        "BLOCK_WIDTH": max(16, triton.next_power_of_2(width)),
    }


def block_group(q: Tensor, k: Tensor) -> int:
    """Rows of a group's tile: tensor cores take no fewer than 16."""
    return max(16, triton.next_power_of_2(q.shape[2] // k.shape[2]))


def precision(x: Tensor) -> str:
    """Of products of fp32: a selection must not depend on TF32's rounding, nor gradients on another one than it."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def count_keys(indices: Tensor) -> Tensor:
    """(B, L, K) -> (B, L) int32, how many keys each query has."""
    return (indices >= 0).sum(dim=-1, dtype=torch.int32)


def forward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `reference.attend_reference`."""
    q, k, v, indices = q.contiguous(), k.contiguous(), v.contiguous(), indices.contiguous()
    batch, length = q.shape[:2]
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    _forward_kernel[(length, k.shape[2], batch)](
        q,
        k,
        v,
        indices,
        count_keys(indices),
        o,
        lse,
        scale,
        length,
        k.shape[1],
        **sizes(q, k),
        N_SLOTS=indices.shape[2],
        BLOCK_GROUP=block_group(q, k),
        BLOCK=64 if q.element_size() == 2 else 32,
        PRECISION=precision(q),
        num_warps=4,
    )
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    is_deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.attend_backward_reference`."""
    do, q, k, v, indices = do.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), indices.contiguous()
    batch, length = q.shape[:2]
    delta = (do.float() * o.float()).sum(dim=-1)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    constants = sizes(q, k)
    _backward_kernel[(length, k.shape[2], batch)](
        q,
        k,
        v,
        indices,
        count_keys(indices),
        lse,
        delta,
        do,
        dq,
        dk,
        dv,
        scale,
        length,
        k.shape[1],
        **constants,
        N_SLOTS=indices.shape[2],
        BLOCK_GROUP=block_group(q, k),
        BLOCK=32,
        ADDS_KEYS=not is_deterministic,
        PRECISION=precision(q),
        num_warps=4,
    )
    if is_deterministic:
        for queries, bounds, _ in inverse_chunks(indices, k.shape[1]):
            _keys_kernel[(batch * k.shape[1], k.shape[2])](
                q, k, v, queries, bounds, lse, delta, do, dk, dv, scale, **constants, BLOCK=32, num_warps=4
            )
    return dq, dk.to(k.dtype), dv.to(v.dtype)
