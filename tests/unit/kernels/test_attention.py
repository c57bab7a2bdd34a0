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


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("n_queries", [1, 8, 20])
def test_the_last_queries_alone(n_queries: int, window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 21, 4, 6, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(2, 21, 2, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    out = attention(q[:, -n_queries:], k, v, window=window, backend="reference")
    for row in range(2):
        torch.testing.assert_close(out[row], written_out(q[row], k[row], v[row], window, [0, 21])[-n_queries:])


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("first", [0, 2, 3, 9, 20])
def test_documents_with_queries_from_some_token_on(first: int, window: int) -> None:
    """Of two rows laid end to end; some documents have all their queries here, some the last, some none."""
    generator = torch.Generator().manual_seed(0)
    length, rows = 21, [[0, 3, 4, 21], [0, 10, 21]]
    q = torch.randn(2, length, 4, 6, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(2, length, 2, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    bounds_q, bounds_k = [0], [0]
    for row in rows:
        here = [max(b - first, 0) for b in row]
        bounds_q += [bounds_q[-1] + b for b in here[1:]]
        bounds_k += [bounds_k[-1] + b for b in row[1:]]
    out = attention(
        q[:, first:].flatten(0, 1)[None],
        k.flatten(0, 1)[None],
        v.flatten(0, 1)[None],
        window=window,
        cu_seqlens=torch.tensor(bounds_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(bounds_k, dtype=torch.int32),
        backend="reference",
    )
    expected = [written_out(q[i], k[i], v[i], window, row)[first:] for i, row in enumerate(rows)]
    torch.testing.assert_close(out[0], torch.cat(expected))


def test_keys_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(1, 4, 1, 2), torch.zeros(1, 3, 1, 2)
    with pytest.raises(ValueError, match="3 keys for 4 queries"):
        attention(q, k, k, backend="reference")
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        attention(k, q, q, cu_seqlens=bounds, backend="reference")
