"""Choosing the next token."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, *, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """One token for each row of ``logits`` (B, vocab) -> (B,). A row's token depends on nothing but that row.

    Args:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p: sample among the fewest likeliest tokens whose probabilities sum to at least this (nucleus sampling,
            arXiv 1904.09751); 1 samples among all.
        uniform: (B,), fp64 in [0, 1), each row's draw; not looked at with temperature 0.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = before < top_p  # the likeliest token has nothing before it and always stays
    cumulative = (probabilities * kept).cumsum(dim=-1)
    # The first token whose cumulative probability exceeds the draw. A GPU sums in parallel, so that the sums behind the
    # last token kept may differ from its own in their last bit: no draw may lead past it.
    choice = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    choice = torch.minimum(choice, kept.sum(dim=-1, keepdim=True) - 1)
    return order.gather(-1, choice).squeeze(-1)


def draws(seed: int, n_tokens: int) -> Tensor:
    """The draws (n_tokens,) in [0, 1), fp64 on the CPU, of a sequence's tokens: more tokens begin with the same."""
    return torch.rand(n_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
