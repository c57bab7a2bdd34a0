"""RWKV-7's token shift against one document after another."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lt2titan.model.mixers.token_shift import token_shift

DOCUMENTS = [0, 0, 1, 4, 4, 4, 9, 9]  # lengths 0, 1, 3, 0, 0, 5, 0


def one_after_another(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    before, rows = state, []
    for token in x:
        rows.append(before)
        before = token
    return torch.stack(rows) if rows else x, before


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", [1, 6])
def test_dense_rows(with_state: bool, length: int) -> None:
    x, state = random(3, length, 2, seed=0), random(3, 2, seed=1) * with_state
    shifted, last = token_shift(x, state if with_state else None, None)
    for row in range(3):
        expected = one_after_another(x[row], state[row])
        torch.testing.assert_close((shifted[row], last[row]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_documents_some_of_them_empty(with_state: bool, dtype: torch.dtype) -> None:
    x, state = random(1, 9, 2, seed=0).requires_grad_(), random(7, 2, seed=1) * with_state
    shifted, last = token_shift(x, state if with_state else None, torch.tensor(DOCUMENTS, dtype=dtype))
    alone = [one_after_another(x[0, a:b], state[n]) for n, (a, b) in enumerate(pairwise(DOCUMENTS))]
    expected = torch.cat([rows for rows, _ in alone])[None], torch.stack([end for _, end in alone])
    torch.testing.assert_close((shifted, last), expected, rtol=0, atol=0)
    weights = random(1, 9, 2, seed=2), random(7, 2, seed=3)
    grads = [torch.autograd.grad(pair, x, weights, retain_graph=True) for pair in ((shifted, last), expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
