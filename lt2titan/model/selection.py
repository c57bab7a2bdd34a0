"""How good the choice of layers that choose what attention sees is, and how it changes from loop to loop."""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.kernels.dsa.reference import document_starts, index_scores, precise, query_blocks, top_slots
from lt2titan.model.context import Context
from lt2titan.model.mixers.dsa import DSA
from lt2titan.model.stretch import rows_so_far


def selection_figures(
    mixer: DSA, x: Tensor, context: Context, queries: Tensor, counted: Tensor, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Figures of one visit over ``queries`` (n,), places in each row, where ``counted`` (B, n) says so; and its choice.

    A query counts if it has more keys to choose from than it may choose. Its recall is the attention probability, mean
    over heads, that full attention would give to the chosen keys, divided by the most that as many keys could have;
    its overlap is the share of its choice that an earlier loop's, ``before``, has too.

    Args:
        x: (B, L, dim), or packed (1, B L, dim), what the mixer reads.
        before: (B, n, K), the same layer's choice in the loop before, None in the first.

    Returns:
        (4,) fp64: recall summed and how many were, overlap summed and how many were; and the choice (B, n, K) int32 of
        places among the row's keys, which is ``before`` where the loop reuses it.
    """
    q, k, _ = mixer.heads(x, context)
    q, k = mixer.of_all_ranks(q, mixer.head_dim), mixer.all_keys(k)
    q, k, index_q, index_k, w = (t.reshape(len(counted), -1, *t.shape[2:]) for t in (q, k, *mixer.index(x, context)))
    cu_seqlens = context.cu_seqlens
    if context.stretch is not None:
        k, index_k = rows_so_far(k, index_k, stretch=context.stretch)
        cu_seqlens = context.stretch.cu_seqlens_k
    (batch, length, n_heads, width), n_keys = q.shape, k.shape[1]
    keys = torch.arange(n_keys, device=x.device)
    starts = document_starts(batch, length, n_keys, cu_seqlens, x.device)
    sums, choices = torch.zeros(4, dtype=torch.float64, device=x.device), []
    for block in query_blocks(len(queries), batch * n_keys * (n_heads + mixer.n_index_heads)):
        rows = queries[block]
        t, start = (n_keys - length + rows)[:, None], starts[:, rows, None]
        visible = (keys <= t) & (keys >= start)
        if context.reuses_selection and before is not None:
            chosen = before[:, block]
        else:
            forced = visible & (keys > t - mixer.forced_local)
            if mixer.forced_first:
                forced |= keys == start
            scores = index_scores(index_q[:, rows], index_k, w[:, rows])
            chosen = top_slots(scores, visible, forced, min(mixer.top_k, n_keys))
        choices.append(chosen)
        grouped = precise(q[:, rows]).unflatten(2, (k.shape[2], -1))
        products = torch.einsum("bnhgd,bmhd->bhgnm", grouped, precise(k)) * width**-0.5
        p = products.masked_fill(~visible[:, None, None], -torch.inf).softmax(dim=-1).mean(dim=(1, 2))  # (B, n, Lk)
        is_chosen = _as_mask(chosen, n_keys)
        most = p.topk(min(mixer.top_k, n_keys), dim=-1).values.sum(dim=-1)
        recall = (p * is_chosen).sum(dim=-1) / most
        counts = counted[:, block] & (visible.sum(dim=-1) > mixer.top_k)
        sums[:2] += torch.stack([recall.double().masked_fill(~counts, 0.0).sum(), counts.sum()])
        if before is not None:
            shared = (is_chosen & _as_mask(before[:, block], n_keys)).sum(dim=-1) / is_chosen.sum(dim=-1)
            sums[2:] += torch.stack([shared.double().masked_fill(~counts, 0.0).sum(), counts.sum()])
    return sums, torch.cat(choices, dim=1)


def _as_mask(chosen: Tensor, n_keys: int) -> Tensor:
    """(B, n, K) places, -1 for none -> (B, n, n_keys) bool."""
    mask = chosen.new_zeros(*chosen.shape[:2], n_keys + 1, dtype=torch.bool)
    return mask.scatter(2, torch.where(chosen < 0, n_keys, chosen).long(), True)[..., :n_keys]
