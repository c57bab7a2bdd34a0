"""Choosing the next token."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """One token for each row of ``logits`` (B, vocab) -> (B,).

    Args:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p: sample among the fewest likeliest tokens whose probabilities sum to at least this (nucleus sampling,
            arXiv 1904.09751); 1 samples among all.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    sorted_probabilities, order = probabilities.sort(dim=-1, descending=True)
    before = sorted_probabilities.cumsum(dim=-1) - sorted_probabilities
    sorted_probabilities[before >= top_p] = 0.0  # the likeliest token has nothing before it and always stays
    choice = torch.multinomial(sorted_probabilities, 1, generator=generator)
    return order.gather(-1, choice).squeeze(-1)
