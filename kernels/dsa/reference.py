"""DeepSeek Sparse Attention in plain PyTorch (DeepSeek-V3.2, arXiv 2512.02556, section 2.1), in blocks of queries.

    I_ts = sum_j w_tj ReLU(q^I_tj . k^I_s)        the lightning indexer's score of key s for query t
    S_t  = the top_k keys of greatest score among those that t sees; of equal scores the earlier key wins
    o_t  = softmax over S_t of q_t . k_s, times v_s

Shapes: B rows, L queries, Lk keys, H query heads in groups of G per key head, Hkv key heads, D head width, J index
heads of width E with one key for all, K slots of a selection. A row may have keys of earlier tokens that have no query
here: its last L keys are those of its queries. Computed in fp32 at least, fp64 for fp64 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 1 << 24
"""Entries of the largest tensor that a block of queries makes: 64 MB in fp32, whatever the length."""


def precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def query_blocks(length: int, numbers_per_query: int) -> Iterator[slice]:
    """Consecutive blocks of ``length`` queries, each of which makes ``numbers_per_query`` numbers."""
    size = max(1, NUMBERS // numbers_per_query)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def document_starts(batch: int, length: int, n_keys: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """(B, L) int64: where each query's document begins in its row of ``n_keys`` keys; with the row at the latest.

    cu_seqlens: boundaries over the keys of all rows, flattened; None: a row is one document.
    """
    if cu_seqlens is None:
        return torch.zeros(batch, length, dtype=torch.int64, device=device)
    rows = torch.arange(0, batch * n_keys, n_keys, device=device)[:, None]
    keys = rows + torch.arange(n_keys - length, n_keys, device=device)
    bounds = cu_seqlens.to(keys.dtype)
    return (bounds[torch.bucketize(keys, bounds[1:], right=True)] - rows).clamp(min=0)


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """q (B, n, J, E), k (B, m, E), w (B, n, J) -> I (B, n, m)."""
    q, k, w = precise(q), precise(k), precise(w)
    return torch.einsum("bnj,bnjm->bnm", w, torch.einsum("bnje,bme->bnjm", q, k).relu())


def top_slots(scores: Tensor, visible: Tensor, forced: Tensor | None, n_slots: int) -> Tensor:
    """Places of the ``n_slots`` greatest ``scores`` (B, n, m) among the visible ones: (B, n, n_slots) int32, ascending,
    then -1 where fewer are visible. Of equal scores the lower place wins; ``forced`` ones come before all others.

    visible, forced: (B or 1, n, m) bool.
    """
    if forced is not None:
        scores = scores.masked_fill(forced, torch.inf)
    scores = scores.masked_fill(~visible, -torch.inf)
    n_keys = scores.shape[-1]
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :n_slots]
    order = order.masked_fill(~visible.expand(scores.shape).gather(-1, order), n_keys).sort(dim=-1).values
    slots = order.masked_fill(order == n_keys, -1).int()
    return F.pad(slots, (0, n_slots - slots.shape[-1]), value=-1)


def select_reference(
    q: Tensor, k: Tensor, w: Tensor, cu_seqlens: Tensor | None, top_k: int, forced_first: bool, forced_local: int
) -> Tensor:
    """Selections (B, L, K) int32 of places in the row of keys, K = min(top_k, Lk); see `top_slots`."""
    (batch, length, n_heads, _), n_keys = q.shape, k.shape[1]
    starts = document_starts(batch, length, n_keys, cu_seqlens, q.device)
    keys = torch.arange(n_keys, device=q.device)
    own = keys[n_keys - length :]
    selections = []
    for rows in query_blocks(length, batch * n_heads * n_keys):
        seen = keys[: n_keys - length + rows.stop]
        t, start = own[rows, None], starts[:, rows, None]
        visible = (seen <= t) & (seen >= start)
        forced = visible & (seen > t - forced_local)
        if forced_first:
            forced |= seen == start
        scores = index_scores(q[:, rows], k[:, : len(seen)], w[:, rows])
        selections.append(top_slots(scores, visible, forced, min(top_k, n_keys)))
    return torch.cat(selections, dim=1)


def gather_keys(x: Tensor, indices: Tensor) -> Tensor:
    """x (B, Lk, ...), indices (B, n, K), -1 for none (whatever is gathered there is no key) -> (B, n, K, ...)."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x[rows, indices.clamp(min=0).long()]


def _scatter_keys(total: Tensor, indices: Tensor, parts: Tensor) -> None:
    """Add parts (B, n, K, ...) to total (B, Lk, ...) where `gather_keys` reads; parts are 0 where indices are -1."""
    rows = torch.arange(total.shape[0], device=total.device)[:, None, None] * total.shape[1]
    total.flatten(0, 1).index_add_(0, (rows + indices.clamp(min=0)).flatten().long(), parts.flatten(0, 2))


def _grouped(q: Tensor, n_kv_heads: int) -> Tensor:
    """(B, n, H, ...) -> (B, n, Hkv, G, ...) in fp32 at least."""
    return precise(q).unflatten(2, (n_kv_heads, -1))


def _selected_scores(q: Tensor, k: Tensor, indices: Tensor, scale: float) -> Tensor:
    """q (B, n, H, D) -> scaled q . k (B, n, Hkv, G, K) over selected keys, -inf where there is none."""
    keys = precise(gather_keys(k, indices))
    scores = torch.einsum("bnhgd,bnkhd->bnhgk", _grouped(q, k.shape[2]), keys) * scale
    return scores.masked_fill((indices < 0)[:, :, None, None], -torch.inf)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, L, H, D), k, v (B, Lk, Hkv, D), indices (B, L, K) -> o (B, L, H, D) and the log of the sum of exponentials
    (B, L, H)."""
    outputs, lses = [], []
    for rows in query_blocks(q.shape[1], q.shape[0] * indices.shape[2] * (q.shape[2] + k.shape[2] * k.shape[3])):
        scores = _selected_scores(q[:, rows], k, indices[:, rows], scale)
        lse = scores.logsumexp(dim=-1, keepdim=True)
        values = precise(gather_keys(v, indices[:, rows]))
        outputs.append(torch.einsum("bnhgk,bnkhd->bnhgd", (scores - lse).exp(), values).flatten(2, 3).to(q.dtype))
        lses.append(lse.squeeze(-1).flatten(2))
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)


def attend_backward_reference(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for that of o, (B, L, H, D)."""
    n_kv = k.shape[2]
    dk, dv = torch.zeros_like(precise(k)), torch.zeros_like(precise(v))
    dqs = []
    for rows in query_blocks(q.shape[1], q.shape[0] * indices.shape[2] * (q.shape[2] + n_kv * k.shape[3])):
        slots = indices[:, rows]
        p = (_selected_scores(q[:, rows], k, slots, scale) - lse[:, rows].unflatten(2, (n_kv, -1))[..., None]).exp()
        do_rows = _grouped(do[:, rows], n_kv)
        dp = torch.einsum("bnhgd,bnkhd->bnhgk", do_rows, precise(gather_keys(v, slots)))
        delta = (do_rows * _grouped(o[:, rows], n_kv)).sum(dim=-1, keepdim=True)
        ds = p * (dp - delta) * scale
        dqs.append(torch.einsum("bnhgk,bnkhd->bnhgd", ds, precise(gather_keys(k, slots))).flatten(2, 3))
        _scatter_keys(dk, slots, torch.einsum("bnhgk,bnhgd->bnkhd", ds, _grouped(q[:, rows], n_kv)))
        _scatter_keys(dv, slots, torch.einsum("bnhgk,bnhgd->bnkhd", p, do_rows))
    return torch.cat(dqs, dim=1).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
