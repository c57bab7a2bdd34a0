"""Attention against softmax written out."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from lt2titan.kernels.attention import attention


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, bounds: list[int]) -> torch.Tensor:
    """One row (L, H, D), token by token; bounds are where documents begin, and L."""
    out = torch.empty_like(q)
    n_groups = q.shape[1] // k.shape[1]
    for start, end in pairwise(bounds):
        for i in range(start, end):
            first = max(start, i - window + 1) if window else start
            for h in range(q.shape[1]):
                keys, values = k[first : i + 1, h // n_groups], v[first : i + 1, h // n_groups]
                scores = keys @ q[i, h] / math.sqrt(q.shape[2])
                out[i, h] = torch.exp(scores - scores.logsumexp(0)) @ values
    return out


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 4, 21, 21, 21]])
def test_matches_the_definition(n_kv_heads: int, window: int, cu_seqlens: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = 2 if cu_seqlens is None else 1
    q = torch.randn(batch, 21, 4, 6, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(batch, 21, n_kv_heads, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    out = attention(q, k, v, window=window, cu_seqlens=bounds, max_seqlen=21, backend="reference")
    for row in range(batch):
        expected = written_out(q[row], k[row], v[row], window, cu_seqlens or [0, 21])
        torch.testing.assert_close(out[row], expected)


@pytest.mark.parametrize("window", [1, 4, 7, 30])
def test_a_window_is_sdpa_with_its_mask(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 30, 4, 6, dtype=torch.float64, generator=generator) for _ in range(3))
    band = torch.ones(30, 30, dtype=torch.bool).tril() & torch.ones(30, 30, dtype=torch.bool).triu(1 - window)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=band)
    torch.testing.assert_close(attention(q, k, v, window=window, backend="reference"), expected.transpose(1, 2))
