"""The compressed branch and the choice of blocks as Triton kernels.

A program has the queries of a few neighbouring tokens with all heads of a group as the rows of its tile, because they
share a key head: compressed keys are read once for all of them. Groups are padded to a power of two, so that any number
of heads fits. Scores exist a tile at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt2titan.kernels.nsa.layout import BlockLayout

LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Sizes of a kernel's tiles for keys of 256 bytes (128 channels in bf16); wider ones get smaller tiles.

    rows: queries times the heads of a group. keys: keys, compressed or not.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


FORWARD, SELECT = Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)
BACKWARD_Q, BACKWARD_KV = Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)
MAX_SPLITS = 16
"""Programs that share the queries of one tile of compressed keys: the first block is seen by all that follow."""
PROGRAMS = 512
"""Programs wanted, about four for each multiprocessor."""


@triton.jit
def _rows(tile, T, query_position, query_block, BS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr):
    """Of each row (BQ * GP,): its token, head in the group, whether it is one, first block, and past blocks."""
    row = tl.arange(0, BQ * GP)
    token = tile * BQ + row // GP
    head = row % GP
    is_row = (token < T) & (head < G)
    position = tl.load(query_position + token, mask=token < T, other=-1)
    first = tl.load(query_block + token, mask=token < T, other=0)
    n_past = (position + 1) // BS
    return token, head, is_row, first, n_past


@triton.jit
def _forward_kernel(
    q, k, v, o, lse, query_position, query_block, T, C, scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv = tl.program_id(1)
    token, head, is_row, first, n_past = _rows(tl.program_id(0), T, query_position, query_block, BS, G, GP, BQ)
    low = tl.min(tl.where(n_past > 0, first, C))
    high = tl.max(first + n_past)
    d = tl.arange(0, BD)
    is_d = (d < D)[None, :]
    place = token.to(tl.int64) * H + kv * G + head
    at = place[:, None] * D + d[None, :]
    b_q = tl.load(q + at, mask=is_row[:, None] & is_d, other=0.0)
    highest = tl.full([BQ * GP], float("-inf"), tl.float32)
    total = tl.zeros([BQ * GP], tl.float32)
    b_o = tl.zeros([BQ * GP, BD], tl.float32)
    for c0 in tl.range(low, high, BC):
        c = c0 + tl.arange(0, BC)
        at_k = (c.to(tl.int64)[:, None] * HKV + kv) * D + d[None, :]
        is_k = (c < high)[:, None] & is_d
        b_k = tl.load(k + at_k, mask=is_k, other=0.0)
        b_v = tl.load(v + at_k, mask=is_k, other=0.0)
        seen = (c[None, :] >= first[:, None]) & (c[None, :] < (first + n_past)[:, None])
        s = tl.where(seen, tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale, float("-inf"))
        new = tl.maximum(highest, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(highest - base)
        p = tl.exp2(s - base[:, None])
        total = total * shrink + tl.sum(p, 1)
        b_o = b_o * shrink[:, None] + tl.dot(p.to(b_v.dtype), b_v, input_precision=PRECISION)
        highest = new
    is_any = total > 0
    b_o = b_o / tl.where(is_any, total, 1.0)[:, None]
    b_lse = tl.where(is_any, (highest + tl.log2(tl.where(is_any, total, 1.0))) / 1.4426950408889634, float("-inf"))
    tl.store(o + at, b_o.to(o.dtype.element_ty), mask=is_row[:, None] & is_d)
    tl.store(lse + place, b_lse, mask=is_row)


@triton.jit
def _select_kernel(
    q, k, lse, blocks, query_position, query_block, T, scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Keeps the best SP blocks of each query as integers: probability above, what is left to the last block below, so
    that the greater integer is the more probable block, and of equals the older."""
    kv = tl.program_id(1)
    token, head, is_row, first, n_past = _rows(tl.program_id(0), T, query_position, query_block, BS, G, GP, BQ)
    d = tl.arange(0, BD)
    place = token.to(tl.int64) * H + kv * G + head
    b_q = tl.load(q + place[:, None] * D + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0)
    b_lse = tl.load(lse + place, mask=is_row, other=0.0) * 1.4426950408889634

    query = tl.program_id(0) * BQ + tl.arange(0, BQ)
    is_query = query < T
    origin = tl.load(query_block + query, mask=is_query, other=0)
    own = origin + tl.load(query_position + query, mask=is_query, other=0) // BS
    low = tl.min(tl.where(is_query, origin, 2147483647))
    high = tl.max(tl.where(is_query, own, 0)) + 1
    best = tl.full([BQ, SP], -1, tl.int64)
    for c0 in tl.range(low, high, BC):
        c = c0 + tl.arange(0, BC)
        at_k = (c.to(tl.int64)[:, None] * HKV + kv) * D + d[None, :]
        b_k = tl.load(k + at_k, mask=(c < high)[:, None] & (d < D)[None, :], other=0.0)
        seen = (c[None, :] >= first[:, None]) & (c[None, :] < (first + n_past)[:, None]) & is_row[:, None]
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - b_lse[:, None]
        p = tl.where(seen, tl.exp2(s), 0.0)
        probability = tl.sum(tl.reshape(p, [BQ, GP, BC]), 1)
        is_forced = (c[None, :] == origin[:, None]) | (c[None, :] >= own[:, None] - 1)
        rank = tl.where(is_forced, 2147483647, probability.to(tl.int32, bitcast=True))
        key = (rank.to(tl.int64) << 32) | (2147483647 - (c[None, :] - origin[:, None])).to(tl.int64)
        is_candidate = (c[None, :] >= origin[:, None]) & (c[None, :] <= own[:, None])
        key = tl.where(is_candidate, key, -1)
        best = tl.topk(tl.reshape(tl.join(best, tl.topk(key, SP)), [BQ, 2 * SP]), SP)
    column = tl.arange(0, SP)[None, :]
    block = (2147483647 - (best & 2147483647)).to(tl.int32)
    block = tl.sort(tl.where((best >= 0) & (column < S), block, 2147483647), dim=1)
    block = tl.where(block == 2147483647, -1, block)
    at = (query.to(tl.int64)[:, None] * HKV + kv) * S + column
    tl.store(blocks + at, block, mask=is_query[:, None] & (column < S))


@triton.jit
def _backward_q_kernel(
    q, k, v, o, lse, do, dq, delta, query_position, query_block, T, C, scale, plain_scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Also leaves delta = sum(o * do), which `_backward_kv_kernel` reads."""
    kv = tl.program_id(1)
    token, head, is_row, first, n_past = _rows(tl.program_id(0), T, query_position, query_block, BS, G, GP, BQ)
    low = tl.min(tl.where(n_past > 0, first, C))
    high = tl.max(first + n_past)
    d = tl.arange(0, BD)
    is_d = (d < D)[None, :]
    place = token.to(tl.int64) * H + kv * G + head
    at = place[:, None] * D + d[None, :]
    is_at = is_row[:, None] & is_d
    b_q = tl.load(q + at, mask=is_at, other=0.0)
    b_do = tl.load(do + at, mask=is_at, other=0.0)
    b_o = tl.load(o + at, mask=is_at, other=0.0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + place, b_delta, mask=is_row)
    b_lse = tl.load(lse + place, mask=is_row, other=0.0) * 1.4426950408889634
    b_dq = tl.zeros([BQ * GP, BD], tl.float32)
    for c0 in tl.range(low, high, BC):
        c = c0 + tl.arange(0, BC)
        at_k = (c.to(tl.int64)[:, None] * HKV + kv) * D + d[None, :]
        is_k = (c < high)[:, None] & is_d
        b_k = tl.load(k + at_k, mask=is_k, other=0.0)
        b_v = tl.load(v + at_k, mask=is_k, other=0.0)
        seen = (c[None, :] >= first[:, None]) & (c[None, :] < (first + n_past)[:, None])
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        p = tl.where(seen, tl.exp2(s - b_lse[:, None]), 0.0)
        dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        ds = p * (dp - b_delta[:, None])
        b_dq += tl.dot(ds.to(b_k.dtype), b_k, input_precision=PRECISION)
    tl.store(dq + at, (b_dq * plain_scale).to(dq.dtype.element_ty), mask=is_at)


@triton.jit
def _backward_kv_kernel(
    q, k, v, lse, do, delta, dk, dv, seen_from, seen_until, T, C, scale, plain_scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
    N_SPLITS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of compressed keys from one part of the queries that see any of them."""
    kv, part = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    is_c = c < C
    b_from = tl.load(seen_from + c, mask=is_c, other=T)
    b_until = tl.load(seen_until + c, mask=is_c, other=0)
    low = tl.min(tl.where(b_from < b_until, b_from, T))
    high = tl.max(tl.where(b_from < b_until, b_until, 0))
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BQ), N_SPLITS) * BQ
    d = tl.arange(0, BD)
    is_k = is_c[:, None] & (d < D)[None, :]
    at_k = (c.to(tl.int64)[:, None] * HKV + kv) * D + d[None, :]
    b_k = tl.load(k + at_k, mask=is_k, other=0.0)
    b_v = tl.load(v + at_k, mask=is_k, other=0.0)
    b_dk = tl.zeros([BC, BD], tl.float32)
    b_dv = tl.zeros([BC, BD], tl.float32)
    row = tl.arange(0, BQ * GP)
    for token0 in tl.range(low + part * share, tl.minimum(low + (part + 1) * share, high), BQ):
        token, head = token0 + row // GP, row % GP
        is_row = (token < high) & (head < G)
        place = token.to(tl.int64) * H + kv * G + head
        at = place[:, None] * D + d[None, :]
        is_at = is_row[:, None] & (d < D)[None, :]
        b_q = tl.load(q + at, mask=is_at, other=0.0)
        b_do = tl.load(do + at, mask=is_at, other=0.0)
        b_lse = tl.load(lse + place, mask=is_row, other=0.0) * 1.4426950408889634
        b_delta = tl.load(delta + place, mask=is_row, other=0.0)
        seen = (token[None, :] >= b_from[:, None]) & (token[None, :] < b_until[:, None]) & is_row[None, :]
        s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
        p = tl.where(seen, tl.exp2(s - b_lse[None, :]), 0.0)
        b_dv += tl.dot(p.to(b_do.dtype), b_do, input_precision=PRECISION)
        dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        ds = p * (dp - b_delta[None, :])
        b_dk += tl.dot(ds.to(b_q.dtype), b_q, input_precision=PRECISION)
    at_part = part.to(tl.int64) * C * HKV * D + at_k
    tl.store(dk + at_part, b_dk * plain_scale, mask=is_k)
    tl.store(dv + at_part, b_dv, mask=is_k)


def sizes(q: Tensor, k: Tensor, block_size: int, tile: Tile) -> dict[str, Any]:
    """What a kernel is specialised for and started with; q (T, H, D), k (..., Hkv, D)."""
    n_heads, head_dim = q.shape[-2:]
    n_kv_heads = k.shape[-2]
    padded = triton.next_power_of_2(n_heads // n_kv_heads)
    width = max(triton.next_power_of_2(head_dim), 16)
    shrink = max(width * q.element_size() // 256, 1)  # a tile of 256-byte rows fills the shared memory well
    return {
        "H": n_heads,
        "HKV": n_kv_heads,
        "D": head_dim,
        "BD": width,
        "BS": block_size,
        "G": n_heads // n_kv_heads,
        "GP": padded,
        "BQ": max(max(tile.rows // shrink, 16) // padded, 1),
        "BC": max(tile.keys // shrink, 16),
        # fp32 stays fp32: the choice of blocks should not hang on TF32's rounding.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, layout: BlockLayout, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As reference.compressed_forward."""
    q, k_cmp, v_cmp = q.contiguous(), k_cmp.contiguous(), v_cmp.contiguous()
    size = sizes(q, k_cmp, block_size, FORWARD)
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    grid = (triton.cdiv(q.shape[0], size["BQ"]), size["HKV"])
    _forward_kernel[grid](
        q, k_cmp, v_cmp, o, lse, layout.query_position, layout.query_block, q.shape[0], k_cmp.shape[0],
        scale * LOG2_E,
        **size,
    )  # fmt: skip
    return o, lse


def select(
    q: Tensor, k_cmp: Tensor, lse: Tensor, layout: BlockLayout, block_size: int, n_blocks: int, scale: float
) -> Tensor:
    """As reference.select."""
    q, k_cmp, lse = q.contiguous(), k_cmp.contiguous(), lse.contiguous()
    size = sizes(q, k_cmp, block_size, SELECT)
    blocks = q.new_empty((q.shape[0], size["HKV"], n_blocks), dtype=torch.int32)
    n_kept = triton.next_power_of_2(n_blocks)
    grid = (triton.cdiv(q.shape[0], size["BQ"]), size["HKV"])
    _select_kernel[grid](
        q, k_cmp, lse, blocks, layout.query_position, layout.query_block, q.shape[0], scale * LOG2_E,
        **{**size, "BC": max(size["BC"], n_kept)}, S=n_blocks, SP=n_kept,
    )  # fmt: skip
    return blocks


def backward(
    do: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, o: Tensor, lse: Tensor,
    layout: BlockLayout, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As reference.compressed_backward; o and lse as `forward` returned them."""
    do, q, k_cmp, v_cmp = do.contiguous(), q.contiguous(), k_cmp.contiguous(), v_cmp.contiguous()
    n_queries, n_blocks = q.shape[0], k_cmp.shape[0]
    size = sizes(q, k_cmp, block_size, BACKWARD_Q)
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    scales = scale * LOG2_E, scale
    _backward_q_kernel[(triton.cdiv(n_queries, size["BQ"]), size["HKV"])](
        q, k_cmp, v_cmp, o, lse, do, dq, delta, layout.query_position, layout.query_block, n_queries, n_blocks, *scales,
        **size,
    )  # fmt: skip
    size = sizes(q, k_cmp, block_size, BACKWARD_KV)
    n_tiles = triton.cdiv(n_blocks, size["BC"])
    n_splits = max(min(PROGRAMS // (n_tiles * size["HKV"]), MAX_SPLITS), 1)
    dk, dv = (q.new_empty((n_splits, *k_cmp.shape), dtype=torch.float32) for _ in range(2))
    _backward_kv_kernel[(n_tiles, size["HKV"], n_splits)](
        q, k_cmp, v_cmp, lse, do, delta, dk, dv, layout.seen_from, layout.seen_until, n_queries, n_blocks, *scales,
        **size, N_SPLITS=n_splits,
    )  # fmt: skip
    return dq, dk.sum(0).to(k_cmp.dtype), dv.sum(0).to(v_cmp.dtype)
