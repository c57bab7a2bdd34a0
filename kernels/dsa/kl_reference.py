"""The loss that an indexer learns by, and its gradient, in plain PyTorch (arXiv 2512.02556, section 2.1.1).

    KL_t = sum_s p_ts (log p_ts - log softmax_s(I_ts))        over the keys that t attends to

p_t is the attention distribution summed over heads and normalised. It is the target and gets no gradient; that of the
scores is softmax(I) - p, so that value and gradient come out of one pass. Shapes as in reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.kernels.dsa.reference import (
    _grouped,
    _scatter_keys,
    _selected_scores,
    document_starts,
    gather_keys,
    precise,
    query_blocks,
)

KL = tuple[Tensor, Tensor, Tensor, Tensor]
"""The sum of KL_t over all queries (), and its gradients for index_q, index_k and w."""


def kl_selected_reference(
    index_q: Tensor, index_k: Tensor, w: Tensor, q: Tensor, k: Tensor, indices: Tensor, scale: float
) -> KL:
    """Over the keys selected by ``indices`` (B, L, K)."""
    total, dk = precise(q).new_zeros(()), torch.zeros_like(precise(index_k))
    dqs, dws = [], []
    for rows in query_blocks(q.shape[1], q.shape[0] * indices.shape[2] * (q.shape[2] + k.shape[2] * k.shape[3])):
        slots = indices[:, rows]
        target = _selected_scores(q[:, rows], k, slots, scale).softmax(dim=-1).mean(dim=(2, 3))
        keys = precise(gather_keys(index_k, slots))
        iq, iw = precise(index_q[:, rows]), precise(w[:, rows])
        products = torch.einsum("bnje,bnke->bnjk", iq, keys).relu()
        kl, d_scores = _divergence(torch.einsum("bnj,bnjk->bnk", iw, products), target, slots >= 0)
        total += kl
        dws.append(torch.einsum("bnk,bnjk->bnj", d_scores, products))
        d_products = d_scores[:, :, None] * iw[..., None] * (products > 0)
        dqs.append(torch.einsum("bnjk,bnke->bnje", d_products, keys))
        _scatter_keys(dk, slots, torch.einsum("bnjk,bnje->bnke", d_products, iq))
    return total, torch.cat(dqs, 1).to(index_q.dtype), dk.to(index_k.dtype), torch.cat(dws, 1).to(w.dtype)


def kl_dense_reference(
    index_q: Tensor, index_k: Tensor, w: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, scale: float
) -> KL:
    """Over all earlier keys of the document."""
    (batch, length, n_heads, _), n_keys = q.shape, k.shape[1]
    starts, places = document_starts(batch, length, n_keys, cu_seqlens, q.device), torch.arange(n_keys, device=q.device)
    own = places[n_keys - length :]
    total, dk = precise(q).new_zeros(()), torch.zeros_like(precise(index_k))
    dqs, dws = [], []
    for rows in query_blocks(length, batch * (n_heads + index_q.shape[2]) * n_keys):
        seen = slice(0, n_keys - length + rows.stop)
        visible = (places[seen] <= own[rows, None]) & (places[seen] >= starts[:, rows, None])  # (B, n, m)
        scores = torch.einsum("bnhgd,bmhd->bnhgm", _grouped(q[:, rows], k.shape[2]), precise(k[:, seen])) * scale
        target = scores.masked_fill_(~visible[:, :, None, None], -torch.inf).softmax(dim=-1).mean(dim=(2, 3))
        keys = precise(index_k[:, seen])
        iq, iw = precise(index_q[:, rows]), precise(w[:, rows])
        products = torch.einsum("bnje,bme->bnjm", iq, keys).relu()
        kl, d_scores = _divergence(torch.einsum("bnj,bnjm->bnm", iw, products), target, visible)
        total += kl
        dws.append(torch.einsum("bnm,bnjm->bnj", d_scores, products))
        d_products = d_scores[:, :, None] * iw[..., None] * (products > 0)
        dqs.append(torch.einsum("bnjm,bme->bnje", d_products, keys))
        dk[:, seen] += torch.einsum("bnjm,bnje->bme", d_products, iq)
    return total, torch.cat(dqs, 1).to(index_q.dtype), dk.to(index_k.dtype), torch.cat(dws, 1).to(w.dtype)


def _divergence(scores: Tensor, target: Tensor, is_key: Tensor) -> tuple[Tensor, Tensor]:
    """The summed KL of ``target`` (B, n, m) to softmax(scores), and its gradient for the scores, 0 where no key is."""
    log_q = scores.masked_fill(~is_key, -torch.inf).log_softmax(dim=-1)
    gap = torch.where(is_key, target.clamp(min=torch.finfo(target.dtype).tiny).log() - log_q, 0.0)
    return (target * gap).sum(), log_q.exp() - target
