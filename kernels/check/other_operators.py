"""Inputs of the operators that are not recurrences, and softmax attention written out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lt2titan.kernels.check.recurrences import Sizes


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def convolution_inputs(
    batch: int, length: int, n_sequences: int, *, D: int, W: int, bias: bool = False, activation: str = "silu"
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": normal(generator, batch, length, D), "weight": normal(generator, D, W)}
    if bias:
        inputs["bias"] = normal(generator, D)
    inputs["initial_state"] = normal(generator, n_sequences, D, W - 1)
    return inputs


def norm_inputs(batch: int, length: int, H: int, D: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = (batch, length, H, D)
    return {"x": normal(generator, *rows), "gate": normal(generator, *rows), "weight": normal(generator, D)}


def attention_inputs(batch: int, length: int, sizes: Sizes) -> dict[str, Tensor]:
    """H query heads; HV key and value heads, all of width K."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (normal(generator, batch, length, n_heads, sizes.K) for n_heads in (sizes.H, sizes.HV, sizes.HV))
    return {"q": q, "k": k, "v": v}


def attention_definition(q: Tensor, k: Tensor, v: Tensor, *, window: int, documents: Sequence[int]) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v with the mask written out; (B, L, H, D)."""
    n_groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(n_groups, dim=2), v.repeat_interleave(n_groups, dim=2)
    length = q.shape[1]
    seen = torch.zeros(length, length, dtype=torch.bool, device=q.device)
    starts = [0, *accumulate(documents)] if documents else [0, length]
    for first, last in pairwise(starts):
        for i in range(first, last):
            seen[i, max(first, i - window + 1 if window else first) : i + 1] = True
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)
