"""Inputs of the operators that are not recurrences, and softmax attention written out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lt2titan.kernels.check.recurrences import Sizes


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def convolution_inputs(
    batch: int, length: int, n_sequences: int, *, D: int, W: int, bias: bool = False, activation: str = "silu"
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": _normal(generator, batch, length, D), "weight": _normal(generator, D, W)}
    if bias:
        inputs["bias"] = _normal(generator, D)
    inputs["initial_state"] = _normal(generator, n_sequences, D, W - 1)
    return inputs


def norm_inputs(batch: int, length: int, H: int, D: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = (batch, length, H, D)
    return {"x": _normal(generator, *rows), "gate": _normal(generator, *rows), "weight": _normal(generator, D)}


def attention_inputs(batch: int, length: int, sizes: Sizes) -> dict[str, Tensor]:
    """H query heads; HV key and value heads, all of width K."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (_normal(generator, batch, length, n_heads, sizes.K) for n_heads in (sizes.H, sizes.HV, sizes.HV))
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


def dsa_inputs(batch: int, length: int, *, H: int, HV: int, K: int, J: int, E: int) -> dict[str, Tensor]:
    """H query heads on HV key heads of width K; J index heads of width E on one index key."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"index_q": (J, E), "index_k": (E,), "w": (J,), "q": (H, K), "k": (HV, K), "v": (HV, K)}
    inputs = {name: _normal(generator, batch, length, *shape) for name, shape in shapes.items()}
    inputs["w"] *= (J * E) ** -0.5
    return inputs


def dsa_definition(
    index_q: Tensor,
    index_k: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    indices: Tensor,
    documents: Sequence[int],
    is_dense: bool,
) -> tuple[Tensor, Tensor]:
    """Attention (B, L, H, D) to the selected keys, and the KL () over them or over all, with (B, H, L, L) tensors."""
    n_groups, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = k.repeat_interleave(n_groups, dim=2), v.repeat_interleave(n_groups, dim=2)
    products = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    learned = torch.zeros(*indices.shape[:2], length + 1, dtype=torch.bool, device=q.device)
    learned = learned.scatter(2, torch.where(indices < 0, length, indices).long(), True)[..., :length]
    p = products.masked_fill(~learned[:, None], -torch.inf).softmax(dim=-1)
    o = torch.einsum("bhij,bjhd->bihd", p, v)
    if is_dense:
        learned = torch.zeros_like(learned)
        for start, end in pairwise([0, *accumulate(documents)] if documents else [0, length]):
            learned[:, start:end, start:end] = torch.ones(end - start, end - start, device=q.device).tril().bool()
        p = products.masked_fill(~learned[:, None], -torch.inf).softmax(dim=-1)
    scores = torch.einsum("bij,bijs->bis", w, torch.einsum("bije,bse->bijs", index_q, index_k).relu())
    log_q = scores.masked_fill(~learned, -torch.inf).log_softmax(dim=-1)[learned]
    target = p.detach().mean(dim=1)[learned]
    return o, (torch.special.xlogy(target, target) - target * log_q).sum()
