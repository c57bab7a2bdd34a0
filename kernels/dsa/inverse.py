"""Selections the other way round: for each key the queries that chose it, so that its gradient has an order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PAIRS = 1 << 24
"""Pairs of a query and a key that are sorted at a time, whatever the length."""


def inverse_chunks(indices: Tensor, n_keys: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of consecutive queries, chunk by chunk: (queries, bounds, slots), for the selections ``indices`` (B, L, K) among
    ``n_keys`` keys (Lk) of each row.

    queries: (n,) int32 rows of (B L), sorted by the key that they chose and then by themselves; with none at the end.
    bounds: (B Lk + 1,) int64: key i was chosen by queries[bounds[i] : bounds[i + 1]].
    slots: (n,) int64 places of the same pairs in indices, flattened.
    """
    batch, length, n_slots = indices.shape
    n_rows = batch * length
    flat = indices.flatten(0, 1)
    size = max(1, PAIRS // n_slots)
    keys = torch.arange(batch * n_keys + 1, device=indices.device)
    for start in range(0, n_rows, size):
        chunk = flat[start : start + size].long()
        rows = torch.arange(start, start + len(chunk), device=indices.device)[:, None]
        chosen = torch.where(
            chunk < 0, batch * n_keys, chunk + rows // length * n_keys
        ).flatten()  # none: after all keys
        chosen, order = chosen.sort(stable=True)
        bounds = torch.searchsorted(chosen, keys)
        yield (start + order // n_slots).int(), bounds, start * n_slots + order
