"""Context parallelism as the model sees it: rows whose tokens lie on several ranks, and what passes between these.

Every rank of the group has one stretch of each row: equal parts, in the order of the ranks. Layers that look at one
token know nothing of it. What mixes tokens asks here for what lies on earlier ranks: keys and values (attention), the
last few tokens (convolutions, token shift), or the state that a recurrence would have reached.

Shapes: B rows, L tokens of a stretch, C ranks, N sequences (rows, or packed documents, of which a stretch may have the
end, the middle or nothing), H heads, K and V head widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.recurrence import state_dtype
from lt2titan.model.shares import Share, gather_ranks, gather_tokens


@dataclass(frozen=True)
class Stretch:
    """This rank's part of every row.

    share: which stretch this is, of how many; and the ranks' group.
    first: (B,) int64, the sequence that each row's first token here belongs to.
    last: (B,) int64, the one that its last token here belongs to.
    n_before: (B,) int64, tokens of the first sequence that lie on earlier ranks.
    cu_seqlens_k: (N + 1,) int32 boundaries of packed documents over the rows as far as this stretch reaches, flattened;
        None for dense rows.
    is_ring: whether softmax attention passes keys round in a ring, where it would gather them.
    """

    share: Share
    first: Tensor
    last: Tensor
    n_before: Tensor
    cu_seqlens_k: Tensor | None
    is_ring: bool = False

    def rows(self, x: Tensor) -> Tensor:
        """(B, L, ...), or packed (1, B L, ...), as (B, L, ...)."""
        return x.unflatten(1, (-1, x.shape[0] * x.shape[1] // self.first.shape[0])).flatten(0, 1)


def find_stretch(
    positions: Tensor,
    share: Share,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    is_ring: bool = False,
) -> Stretch:
    """Where the sequences of a forward pass lie.

    Args:
        positions: (B, L), of each token in its document.
        cu_seqlens: (N + 1,) boundaries of the documents over the flattened tokens of this rank (B x L); a document
            that has no token here is empty.
        cu_seqlens_k, is_ring: as in Stretch.
    """
    n_rows, length = positions.shape
    first = last = torch.arange(n_rows, device=positions.device)
    if cu_seqlens is not None:
        starts = first * length
        # The number of documents that have ended: empty ones are never chosen.
        ends = cu_seqlens[1:].long().contiguous()
        first = torch.searchsorted(ends, starts, right=True)
        last = torch.searchsorted(ends, starts + length - 1, right=True)
    return Stretch(share, first, last, positions[:, 0], cu_seqlens_k, is_ring)


def with_earlier_keys(k: Tensor, v: Tensor, stretch: Stretch) -> tuple[Tensor, Tensor]:
    """k and v (B, L, H, D) of each rank -> those of the rows from their first token to this stretch's last,
    (B, (rank + 1) L, H, D). Packed rows come, and go, as one."""
    seen = _so_far(torch.stack([k, v], dim=2), stretch)  # (B, (rank + 1) L, 2, H, D)
    if stretch.cu_seqlens_k is not None:
        seen = seen.flatten(0, 1).unsqueeze(0)
    return seen[:, :, 0], seen[:, :, 1]


def rows_so_far(*tensors: Tensor, stretch: Stretch) -> list[Tensor]:
    """Each (B, L, ...), or packed (1, B L, ...), of each rank -> that of the rows from their first token to this
    stretch's last, (B, (rank + 1) L, ...); all in one collective."""
    parts = [stretch.rows(x) for x in tensors]
    seen = _so_far(torch.cat([x.flatten(2) for x in parts], dim=2), stretch)
    widths = [x[0, 0].numel() for x in parts]
    split = zip(seen.split(widths, dim=2), parts, strict=True)
    return [x.unflatten(2, part.shape[2:]).contiguous() for x, part in split]  # not views that keep later tokens too


def _so_far(x: Tensor, stretch: Stretch) -> Tensor:
    """x (B, L, ...) of each rank, or packed, up to this one's: (B, (rank + 1) L, ...)."""
    rows = stretch.rows(x)
    return gather_tokens(rows, stretch.share)[:, : (stretch.share.rank + 1) * rows.shape[1]]


def tokens_before(inputs: Sequence[Tensor], n: int, stretch: Stretch, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """The n tokens before each sequence's first one here, oldest first, zeros where the sequence had not begun.

    Each of inputs (B, L, D), or packed (1, B L, D), with L >= n and widths of their own -> (N, n, D); in one gather.
    """
    widths = [x.shape[-1] for x in inputs]
    tails = torch.cat([stretch.rows(x)[:, -n:] for x in inputs], dim=-1)
    tails = gather_ranks(tails, stretch.share)  # (C, B, n, sum of widths)
    # Rank 0 has no earlier neighbour and all its sequences begin here. It looks at somebody all the same: gradients
    # travel in a collective, which all ranks must join.
    before = tails[stretch.share.rank - 1]
    age = torch.arange(n, 0, -1, device=before.device)
    before = torch.where((age <= stretch.n_before.unsqueeze(-1)).unsqueeze(-1), before, 0.0)
    if cu_seqlens is not None:
        before = before.new_zeros(cu_seqlens.shape[0] - 1, *before.shape[1:]).index_copy(0, stretch.first, before)
    return before.split(widths, dim=-1)


def recur_across(
    recurrence: Callable[..., tuple[Tensor, Tensor | None]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Tensor,
    stretch: Stretch,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> Tensor:
    """A recurrence of kernels/ over rows that lie on several ranks; v and the result (B, L, H, V), or packed.

    What a stretch makes of the state S it starts from is affine: its outputs are y + R S and it ends in E + A S. One
    run with K more value channels, in which nothing is written and the state starts as the identity, gives all four. So
    ranks run at the same time, exchange (E, A), and add R S for the S that follows from those before them.
    """
    n_values, dtype = v.shape[-1], state_dtype(q)
    n_sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    identity = F.pad(torch.eye(k.shape[-1], dtype=dtype, device=q.device), (n_values, 0))  # (K, V + K)
    start = identity.new_zeros(n_sequences, v.shape[2], *identity.shape)
    start = start.index_copy(0, stretch.first, identity.expand(len(stretch.first), *start.shape[1:]))
    y, end = recurrence(
        q,
        k,
        F.pad(v, (0, k.shape[-1])),
        *rest,
        initial_state=start,
        cu_seqlens=cu_seqlens,
        return_final_state=True,
        **options,
    )
    assert end is not None  # asked for
    state = _state_before(end.index_select(0, stretch.last), n_values, stretch)
    y, response = y.split([n_values, k.shape[-1]], dim=-1)
    return y + torch.einsum("blhk,bhkv->blhv", stretch.rows(response), state.to(y.dtype)).reshape(y.shape)


def _state_before(end: Tensor, n_values: int, stretch: Stretch) -> Tensor:
    """[E | A] (B, H, K, V + K) of each rank's last sequences -> S (B, H, K, V), where the first ones here start."""
    goes_on = (stretch.n_before > 0)[:, None, None, None]
    state, transition = end.split([n_values, end.shape[-1] - n_values], dim=-1)
    # Where a sequence begins on this rank, nothing of what was before passes through it.
    ends = gather_ranks(torch.cat([state, torch.where(goes_on, transition, 0.0)], dim=-1), stretch.share)
    states, transitions = ends.split([n_values, end.shape[-1] - n_values], dim=-1)  # (C, B, H, K, V), (C, B, H, K, K)
    before = states[0]
    for rank in range(1, stretch.share.rank):
        before = states[rank] + transitions[rank] @ before
    return torch.where(goes_on, before, 0.0)  # rank 0 too: it looks at somebody all the same, as in tokens_before
