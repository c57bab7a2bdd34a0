"""Token-by-token generation with cached state."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lt2titan.inference.sampling import sample
from lt2titan.model.lt2 import LT2
from lt2titan.model.state import allocate


@torch.no_grad()
def generate(
    model: LT2,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[int]:
    """Continue ``prompt`` (token ids, at least one) and yield each new token; stops after ``eos_id``.

    The prompt is read in one pass, each new token in another: one state per (layer, loop) remembers the rest.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens; give some text, or use a tokenizer with a BOS token")
    weight = model.embedding.weight
    generator = torch.Generator(weight.device).manual_seed(seed)
    state = allocate(model, 1, len(prompt) + max_new_tokens, weight.dtype, weight.device)
    tokens = torch.tensor([prompt], device=weight.device)
    for _ in range(max_new_tokens):
        logits = model(tokens, state=state)[:, -1]
        next_token = sample(logits, temperature=temperature, top_p=top_p, generator=generator)
        tokens = next_token[:, None]
        token = int(next_token)
        yield token
        if token == eos_id:
            return
