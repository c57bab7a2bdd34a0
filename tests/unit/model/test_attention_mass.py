"""Attention on a document's first token against a softmax written out, query by query."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lt2titan.model import attention_mass
from lt2titan.model.attention_mass import first_token_mass


def expected_mass(
    q: np.ndarray, k: np.ndarray, window: int, starts: list[int], chosen: list[tuple[int, int]]
) -> tuple[float, int]:
    """Sum and number of the probabilities of (row, token) pairs; ``starts``: where documents of a row start."""
    total, n = 0.0, 0
    for row, i in chosen:
        first = max(s for s in starts if s <= i)
        if i == first or (window and first <= i - window):
            continue
        visible = range(max(first, i - window + 1) if window else first, i + 1)
        for head in range(q.shape[2]):
            kv = head * k.shape[2] // q.shape[2]
            scores = np.exp([q[row, i, head] @ k[row, j, kv] / np.sqrt(q.shape[3]) for j in visible])
            total += scores[0] / scores.sum()
            n += 1
    return total, n


def tensors(batch: int, length: int, n_heads: int, n_kv: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, length, n_heads, 6, generator=generator, dtype=torch.float64)
    return q, torch.randn(batch, length, n_kv, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scores", [1 << 26, 2 * 4 * 23 * 3, 1], ids=["at once", "three at a time", "one by one"])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("starts", [None, [0, 1, 2, 9, 17]], ids=["rows", "packed"])
@pytest.mark.parametrize("step", [1, 3])
def test_mass_equals_the_softmax_written_out(
    scores: int, window: int, starts: list[int] | None, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_mass, "SCORES", scores)
    batch, length = (2, 23) if starts is None else (1, 23)
    q, k = tensors(batch, length, n_heads=4, n_kv=2)
    queries = torch.arange(0, length, step)
    counted = torch.rand(batch, len(queries), generator=torch.Generator().manual_seed(1)) < 0.7
    chosen = [(row, int(queries[n])) for row, n in counted.nonzero().tolist()]
    # Boundaries are padded with the length, as the data loader does it.
    cu_seqlens = None if starts is None else torch.tensor([*starts, length, length, length], dtype=torch.int32)
    result = first_token_mass(q, k, window, cu_seqlens, cu_seqlens, queries, counted)
    expected = expected_mass(q.numpy(), k.numpy(), window, starts or [0], chosen)
    assert result.tolist() == pytest.approx(expected, abs=1e-12)
    assert (window == 1) == (expected[1] == 0)  # the cases say something


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_long_rows_never_have_all_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    length, n_heads = 3000, 2
    monkeypatch.setattr(attention_mass, "SCORES", 100_000)
    q, k = tensors(1, length, n_heads, n_heads)
    with LargestTensor() as largest:
        first_token_mass(q, k, 0, None, None, torch.arange(length), torch.ones(1, length, dtype=torch.bool))
    assert largest.numel <= 100_000  # all scores would be 18 million


def test_lower_precision_is_computed_in_fp32() -> None:
    q, k = (x.bfloat16() for x in tensors(1, 23, 4, 2))
    counted = torch.ones(1, 23, dtype=torch.bool)
    expected = first_token_mass(q.double(), k.double(), 0, None, None, torch.arange(23), counted)
    torch.testing.assert_close(
        first_token_mass(q, k, 0, None, None, torch.arange(23), counted), expected, rtol=1e-6, atol=0
    )
