"""Rows cut into stretches, each with its queries and the keys up to them, as context-parallel ranks have them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lt2titan.kernels.nsa import (
    BlockLayout,
    block_layout,
    compress,
    compressed_attention,
    select_blocks,
    selected_attention,
)

ROWS, LENGTH, SIZE, N_BLOCKS = 2, 132, 16, 4
BOUNDS = [0, 5, 6, 98, 132, 132, 171, 240, 264, 264]
"""Of documents: within a stretch, over one, over all of them; and none."""

Branches = tuple[Tensor, Tensor, Tensor]


def stretch_bounds(first: int, last: int) -> tuple[list[int], list[int]]:
    """BOUNDS over tokens ``first`` to ``last`` of each row, and over those up to ``last``."""
    rows = [min(bound // LENGTH, ROWS - 1) for bound in BOUNDS]
    in_row = [bound - row * LENGTH for bound, row in zip(BOUNDS, rows, strict=True)]
    queries = [r * (last - first) + min(max(i - first, 0), last - first) for r, i in zip(rows, in_row, strict=True)]
    return queries, [r * last + min(i, last) for r, i in zip(rows, in_row, strict=True)]


def stretch_layout(first: int, last: int, packed: bool) -> BlockLayout:
    device = torch.device("cpu")
    if not packed:
        return block_layout(ROWS, last - first, SIZE, None, device, length_k=last)
    bounds, bounds_k = (torch.tensor(b, dtype=torch.int32) for b in stretch_bounds(first, last))
    length, length_k = ROWS * (last - first), ROWS * last
    return block_layout(1, length, SIZE, bounds, device, length_k=length_k, cu_seqlens_k=bounds_k)


def branches(q: Tensor, k: Tensor, v: Tensor, first: int, last: int, packed: bool, backend: str) -> Branches:
    """Of the queries of one stretch of rows (B, L, ...): both outputs and the chosen blocks, (B, last - first, ...)."""
    layout = stretch_layout(first, last, packed)
    q, k, v = q[:, first:last], k[:, :last], v[:, :last]
    if packed:
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
    options = {"block_size": SIZE, "backend": backend}
    k_cmp, v_cmp = compress(k, layout, SIZE), compress(v, layout, SIZE)
    compressed, lse = compressed_attention(q, k_cmp, v_cmp, layout, **options)
    with torch.no_grad():
        blocks = select_blocks(q, k_cmp, lse, layout, n_blocks=N_BLOCKS, **options)
    selected = selected_attention(q, k, v, blocks, layout, **options)
    outputs = (x.reshape(ROWS, last - first, *x.shape[2:]) for x in (compressed, selected, blocks))
    return next(outputs), next(outputs), next(outputs)


def check_stretches(dtype: torch.dtype, backend: str, n_stretches: int, packed: bool, tolerance: float) -> None:
    """Outputs and the sum of all gradients are those of whole rows in fp64, which lie in one piece."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(ROWS, LENGTH, n, 10, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for n in (6, 2, 2)
    )
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    *expected, expected_blocks = branches(*exact, 0, LENGTH, packed, "reference")
    edges = list(pairwise(range(0, LENGTH + 1, LENGTH // n_stretches)))
    parts = [branches(q, k, v, *edge, packed, backend) for edge in edges]
    *got, blocks = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    assert torch.equal(blocks, expected_blocks)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in expected]
    got += torch.autograd.grad(got, [q, k, v], [w.to(dtype) for w in weights])
    expected += torch.autograd.grad(expected, exact, weights)
    for x, y in zip(got, expected, strict=True):
        assert float((x.double() - y).detach().norm() / y.detach().norm()) < tolerance
