"""The selected branch as Triton kernels.

Forward, and the gradient of q: a program has one token with all heads of a group, and streams over the token's blocks.
The gradients of k and v go the other way round: the list of (block, query) pairs is sorted by block and cut into
segments of at most `segment` queries, a program sums one segment, and a second kernel adds the segments of a block in
their order. So a block that every query looks at, as the first one is, does not keep one multiprocessor busy while the
others wait, and no sum depends on who comes first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt2titan.kernels.nsa.compressed_triton import LOG2_E, Tile, sizes
from lt2titan.kernels.nsa.layout import BlockLayout

FORWARD, BACKWARD_Q, BACKWARD_KV = Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(64, 64, 8, 2)
SHORT_SEGMENT, LONG_SEGMENT = 512, 2048
"""Queries of a segment: short ones make enough programs of few tokens, long ones take less memory."""
MANY_PAIRS = 1 << 19


@triton.jit
def _forward_kernel(
    q, k, v, o, lse, blocks, query_position, query_start, scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    token, kv = tl.program_id(0), tl.program_id(1)
    head, d = tl.arange(0, GP), tl.arange(0, BD)
    place = token.to(tl.int64) * H + kv * G + head
    at = place[:, None] * D + d[None, :]
    is_at = (head < G)[:, None] & (d < D)[None, :]
    b_q = tl.load(q + at, mask=is_at, other=0.0)
    position, start = tl.load(query_position + token), tl.load(query_start + token)
    highest = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    b_o = tl.zeros([GP, BD], tl.float32)
    for i in tl.range(0, S * (BS // BC)):
        block = tl.load(blocks + (token.to(tl.int64) * HKV + kv) * S + i // (BS // BC))
        key = block * BS + i % (BS // BC) * BC + tl.arange(0, BC)
        seen = (block >= 0) & (key <= position)
        at_k = ((start + key).to(tl.int64)[:, None] * HKV + kv) * D + d[None, :]
        is_k = seen[:, None] & (d < D)[None, :]
        b_k = tl.load(k + at_k, mask=is_k, other=0.0)
        b_v = tl.load(v + at_k, mask=is_k, other=0.0)
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        s = tl.where(seen[None, :], s, float("-inf"))
        new = tl.maximum(highest, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(highest - base)
        p = tl.exp2(s - base[:, None])
        total = total * shrink + tl.sum(p, 1)
        b_o = b_o * shrink[:, None] + tl.dot(p.to(b_v.dtype), b_v, input_precision=PRECISION)
        highest = new
    b_o = b_o / total[:, None]
    tl.store(o + at, b_o.to(o.dtype.element_ty), mask=is_at)
    tl.store(lse + place, (highest + tl.log2(total)) / 1.4426950408889634, mask=head < G)


@triton.jit
def _backward_q_kernel(
    q, k, v, o, lse, do, dq, delta, blocks, query_position, query_start, scale, plain_scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Also leaves delta = sum(o * do), which `_backward_kv_kernel` reads."""
    token, kv = tl.program_id(0), tl.program_id(1)
    head, d = tl.arange(0, GP), tl.arange(0, BD)
    place = token.to(tl.int64) * H + kv * G + head
    at = place[:, None] * D + d[None, :]
    is_at = (head < G)[:, None] & (d < D)[None, :]
    b_q = tl.load(q + at, mask=is_at, other=0.0)
    b_do = tl.load(do + at, mask=is_at, other=0.0)
    b_o = tl.load(o + at, mask=is_at, other=0.0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + place, b_delta, mask=head < G)
    b_lse = tl.load(lse + place, mask=head < G, other=0.0) * 1.4426950408889634
    position, start = tl.load(query_position + token), tl.load(query_start + token)
    b_dq = tl.zeros([GP, BD], tl.float32)
    for i in tl.range(0, S * (BS // BC)):
        block = tl.load(blocks + (token.to(tl.int64) * HKV + kv) * S + i // (BS // BC))
        key = block * BS + i % (BS // BC) * BC + tl.arange(0, BC)
        seen = (block >= 0) & (key <= position)
        at_k = ((start + key).to(tl.int64)[:, None] * HKV + kv) * D + d[None, :]
        is_k = seen[:, None] & (d < D)[None, :]
        b_k = tl.load(k + at_k, mask=is_k, other=0.0)
        b_v = tl.load(v + at_k, mask=is_k, other=0.0)
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        p = tl.where(seen[None, :], tl.exp2(s - b_lse[:, None]), 0.0)
        dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        ds = p * (dp - b_delta[:, None])
        b_dq += tl.dot(ds.to(b_k.dtype), b_k, input_precision=PRECISION)
    tl.store(dq + at, (b_dq * plain_scale).to(dq.dtype.element_ty), mask=is_at)


@triton.jit
def _backward_kv_kernel(
    q, k, v, lse, do, delta, dk, dv, pair_token, pair_start, segment_block, segment_start, block_start, block_stop,
    block_query, C, n_pairs, n_segments, scale, plain_scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    segment, kv, of_keys = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BC + tl.arange(0, BC)
    block = tl.load(segment_block + kv * n_segments + segment)
    if block < C:
        of_block = kv * (C + 1) + block
        first = tl.load(pair_start + of_block) + (segment - tl.load(segment_start + of_block)) * SEGMENT
        last = tl.minimum(first + SEGMENT, tl.load(pair_start + of_block + 1))
        key = tl.load(block_start + block) + of_keys
        key_query = tl.load(block_query + block) + of_keys  # which query the key's token is, or would be
        d = tl.arange(0, BD)
        at_k = (key.to(tl.int64)[:, None] * HKV + kv) * D + d[None, :]
        is_k = (key < tl.load(block_stop + block))[:, None] & (d < D)[None, :]
        b_k = tl.load(k + at_k, mask=is_k, other=0.0)
        b_v = tl.load(v + at_k, mask=is_k, other=0.0)
        b_dk = tl.zeros([BC, BD], tl.float32)
        b_dv = tl.zeros([BC, BD], tl.float32)
        row = tl.arange(0, BQ * GP)
        head = row % GP
        for pair0 in tl.range(first, last, BQ):
            pair = pair0 + row // GP
            is_row = (pair < last) & (head < G)
            token = tl.load(pair_token + kv.to(tl.int64) * n_pairs + pair, mask=pair < last, other=0)
            place = token.to(tl.int64) * H + kv * G + head
            at = place[:, None] * D + d[None, :]
            is_at = is_row[:, None] & (d < D)[None, :]
            b_q = tl.load(q + at, mask=is_at, other=0.0)
            b_do = tl.load(do + at, mask=is_at, other=0.0)
            b_lse = tl.load(lse + place, mask=is_row, other=0.0) * 1.4426950408889634
            b_delta = tl.load(delta + place, mask=is_row, other=0.0)
            seen = (key_query[:, None] <= token[None, :]) & is_row[None, :]
            s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
            p = tl.where(seen, tl.exp2(s - b_lse[None, :]), 0.0)
            b_dv += tl.dot(p.to(b_do.dtype), b_do, input_precision=PRECISION)
            dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            ds = p * (dp - b_delta[None, :])
            b_dk += tl.dot(ds.to(b_q.dtype), b_q, input_precision=PRECISION)
        at_part = ((kv * n_segments + segment).to(tl.int64) * BS + of_keys[:, None]) * D + d[None, :]
        tl.store(dk + at_part, b_dk * plain_scale, mask=(d < D)[None, :])
        tl.store(dv + at_part, b_dv, mask=(d < D)[None, :])


@triton.jit
def _sum_segments_kernel(
    parts, out, segment_start, block_start, block_stop, C, n_segments,
    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    block, kv = tl.program_id(0), tl.program_id(1)
    of_block = kv * (C + 1) + block
    d = tl.arange(0, BD)
    total = tl.zeros([BS, BD], tl.float32)
    for segment in tl.range(tl.load(segment_start + of_block), tl.load(segment_start + of_block + 1)):
        of_segment = (kv * n_segments + segment).to(tl.int64) * BS
        at_part = (of_segment + tl.arange(0, BS)[:, None]) * D + d[None, :]
        total += tl.load(parts + at_part, mask=(d < D)[None, :], other=0.0)
    key = tl.load(block_start + block) + tl.arange(0, BS)
    is_k = (key < tl.load(block_stop + block))[:, None] & (d < D)[None, :]
    at_k = (key.to(tl.int64)[:, None] * HKV + kv) * D + d[None, :]
    tl.store(out + at_k, total.to(out.dtype.element_ty), mask=is_k)


class Pairs(NamedTuple):
    """(block, query) pairs of each key head, sorted by block, and their segments; all int32.

    token: (Hkv, T * n_blocks), the query of each pair; start: (Hkv, C + 1), the first pair of each block.
    segment_block: (Hkv, n_segments), C for segments that are not needed; segment_start: (Hkv, C + 1).
    """

    token: Tensor
    start: Tensor
    segment_block: Tensor
    segment_start: Tensor


def sorted_pairs(blocks: Tensor, layout: BlockLayout, segment: int) -> Pairs:
    """The queries of every block, from the blocks (T, Hkv, n_blocks) of every query. No synchronisation: there are as
    many segments as there could be."""
    n_queries, n_kv_heads, n_blocks = blocks.shape
    n_all = layout.block_start.shape[0]
    of_pair = torch.where(blocks < 0, n_all, blocks + layout.query_block[:, None, None])
    of_pair, order = of_pair.transpose(0, 1).reshape(n_kv_heads, -1).sort(dim=-1, stable=True)
    all_blocks = torch.arange(n_all + 1, dtype=torch.int32, device=blocks.device).expand(n_kv_heads, -1).contiguous()
    start = torch.searchsorted(of_pair, all_blocks, out_int32=True)
    n_of_block = (start.diff(dim=-1) + segment - 1) // segment
    until = n_of_block.cumsum(dim=-1, dtype=torch.int32)
    n_segments = n_queries * n_blocks // segment + n_all
    segments = torch.arange(n_segments, dtype=torch.int32, device=blocks.device).expand(n_kv_heads, -1).contiguous()
    segment_block = torch.searchsorted(until, segments, right=True, out_int32=True)
    segment_start = torch.cat([until.new_zeros(n_kv_heads, 1), until], dim=-1)
    return Pairs((order // n_blocks).int(), start, segment_block, segment_start)


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, layout: BlockLayout, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As reference.selected_forward, and the log-sum-exp (T, H) of the scores."""
    q, k, v, blocks = q.contiguous(), k.contiguous(), v.contiguous(), blocks.contiguous()
    size = _per_token(q, k, block_size, FORWARD)
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    _forward_kernel[(q.shape[0], size["HKV"])](
        q, k, v, o, lse, blocks, layout.query_position, layout.query_start, scale * LOG2_E,
        **size, S=blocks.shape[-1],
    )  # fmt: skip
    return o, lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, blocks: Tensor,
    layout: BlockLayout, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As reference.selected_backward; o and lse as `forward` returned them."""
    do, q, k, v, blocks = (x.contiguous() for x in (do, q, k, v, blocks))
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    size, scales = _per_token(q, k, block_size, BACKWARD_Q), (scale * LOG2_E, scale)
    _backward_q_kernel[(q.shape[0], size["HKV"])](
        q, k, v, o, lse, do, dq, delta, blocks, layout.query_position, layout.query_start, *scales,
        **size, S=blocks.shape[-1],
    )  # fmt: skip
    n_pairs = q.shape[0] * blocks.shape[-1]
    segment = LONG_SEGMENT if n_pairs > MANY_PAIRS else SHORT_SEGMENT
    pairs = sorted_pairs(blocks, layout, segment)
    n_all, n_segments = layout.block_start.shape[0], pairs.segment_block.shape[1]
    size = sizes(q, k, block_size, BACKWARD_KV)
    size["BC"] = min(size["BC"], block_size)
    shape = (size["HKV"], n_segments, block_size, size["D"])
    dk_parts, dv_parts = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
    _backward_kv_kernel[(n_segments, size["HKV"], block_size // size["BC"])](
        q, k, v, lse, do, delta, dk_parts, dv_parts, *pairs, layout.block_start, layout.block_stop,
        layout.block_query, n_all, n_pairs, n_segments, *scales, **size, SEGMENT=segment,
    )  # fmt: skip
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    for parts, out in ((dk_parts, dk), (dv_parts, dv)):
        _sum_segments_kernel[(n_all, size["HKV"])](
            parts, out, pairs.segment_start, layout.block_start, layout.block_stop, n_all, n_segments,
            **{name: size[name] for name in ("HKV", "D", "BD", "BS")},
        )  # fmt: skip
    return dq, dk, dv


def _per_token(q: Tensor, k: Tensor, block_size: int, tile: Tile) -> dict[str, Any]:
    """Sizes for tiles of one token, padded to the 16 rows that tensor cores take, and of a block or a part of one."""
    size = sizes(q, k, block_size, tile)
    return {**size, "GP": max(size["GP"], 16), "BQ": 1, "BC": min(size["BC"], block_size)}
