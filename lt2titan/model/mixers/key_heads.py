"""Key heads that several tensor-parallel ranks need."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from lt2titan.model.shares import Share


def own_key_heads(keys: Tensor, n_heads: int, share: Share) -> Tensor:
    """Of all key heads (B, L, Hkv, D), those that this rank's share of ``n_heads`` query heads reads: (B, L, n, D).

    Each serves equally many query heads in a row, as attention expects of grouped queries. So where a rank's share cuts
    groups unevenly, a key head comes several times: of 6 query heads in 3 groups, two ranks read 0, 0, 1 and 1, 2, 2.
    """
    n_kv_heads = keys.shape[2]
    n_own, group = n_heads // share.n_ranks, n_heads // n_kv_heads
    run = gcd(n_own, group)  # consecutive query heads that no border of a group or a share parts
    places = [head // group for head in range(share.rank * n_own, (share.rank + 1) * n_own, run)]
    if places == list(range(n_kv_heads)):
        return keys
    return torch.stack([keys[:, :, place] for place in places], dim=2)
