"""Key heads that tensor-parallel ranks pick for their query heads, against every head with a key head of its own."""

from __future__ import annotations

import pytest
import torch

from lt2titan.model.mixers.key_heads import own_key_heads
from lt2titan.model.shares import Share


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "n_ranks", "n_read"),
    [(4, 1, 2, 1), (4, 1, 4, 1), (8, 2, 4, 1), (6, 3, 2, 3), (12, 6, 4, 3), (12, 4, 6, 2), (12, 2, 3, 2), (8, 4, 1, 4)],
)
def test_every_query_head_reads_its_key_head(n_heads: int, n_kv_heads: int, n_ranks: int, n_read: int) -> None:
    keys = torch.arange(2 * 3 * n_kv_heads * 5).view(2, 3, n_kv_heads, 5)
    expected = keys.repeat_interleave(n_heads // n_kv_heads, dim=2).chunk(n_ranks, dim=2)
    for rank in range(n_ranks):
        own = own_key_heads(keys, n_heads, Share(rank, n_ranks))
        assert own.shape[2] == n_read
        assert torch.equal(own.repeat_interleave(n_heads // n_ranks // n_read, dim=2), expected[rank])
