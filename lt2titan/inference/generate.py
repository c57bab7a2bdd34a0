"""Token-by-token generation with cached state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.inference.sampling import draws, sample
from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.model.lt2 import LT2
from lt2titan.model.state import DecodeState, allocate


def generate(
    model: LT2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int = -1,
) -> Iterator[tuple[int, int]]:
    """Continue ``prompts`` (token ids, at least one each) together; yield (index of the prompt, new token) as it comes.

    The prompts, however long each, are read in one packed pass; then every pass adds one token to each sequence. A
    sequence ends with its ``eos_id`` (which is yielded; -1 for none) or ``max_new_tokens``; one that has ended keeps
    its row, so that shapes stay the same, and is no longer heard of. What prompt i becomes depends on that prompt and
    on seed + i alone, not on its neighbours: generated alone with seed + i it becomes the same, up to the rounding of
    matrix products in another batch size.

    Raises:
        ValueError: there is no prompt, or one without tokens or with tokens that the model does not have.
    """
    _check(prompts, model.config.vocab_size)
    return _generate(model, prompts, max_new_tokens, temperature, top_p, seed, eos_id)


@torch.no_grad()
def _generate(
    model: LT2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    eos_id: int,
) -> Iterator[tuple[int, int]]:
    weight = model.embedding.weight
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    state = allocate(model, len(prompts), int(lengths.max()) + max_new_tokens, weight.dtype, weight.device)
    uniform = torch.stack([draws(seed + i, max_new_tokens) for i in range(len(prompts))], dim=1).to(weight.device)
    going = set(range(len(prompts)))
    logits = _prefill(model, prompts, lengths, state)
    for step in range(max_new_tokens):
        tokens = sample(logits, temperature=temperature, top_p=top_p, uniform=uniform[step])
        for i, token in enumerate(tokens.tolist()):
            if i in going:
                yield i, token
                if token == eos_id:
                    going.remove(i)
        if not going or step == max_new_tokens - 1:
            return
        logits = model(tokens[:, None], state=state)[:, 0]


def _prefill(model: LT2, prompts: Sequence[Sequence[int]], lengths: Tensor, state: DecodeState) -> Tensor:
    """The logits (B, vocab) after each prompt; lengths (B,) on the CPU."""
    device = model.embedding.weight.device
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    return model(
        tokens[None],
        state=state,
        cu_seqlens=cu_seqlens,
        chunk_indices=make_chunk_indices(cu_seqlens).to(device),
        logits_at=(lengths.cumsum(0) - 1).to(device),
    )


def _check(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    if not prompts:
        raise ValueError("there is no prompt to continue")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} has no tokens; give some text, or use a tokenizer with a BOS token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompt {i} has tokens from {min(prompt)} to {max(prompt)} and the model knows 0 to {vocab_size - 1}: "
                "use the tokenizer that it was trained with"
            )
