"""Sampling and generation against doing it the slow way."""

from __future__ import annotations

import pytest
import torch

from lt2titan.inference.generate import generate
from lt2titan.inference.sampling import sample
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, GDNConfig, MixersConfig


@pytest.fixture(scope="module")
def model() -> LT2:
    config = ModelConfig(
        vocab_size=31,
        dim=32,
        n_layers=3,
        n_loops=2,
        hybrid=HybridConfig(mixer="full", ratio=2),
        mixers=MixersConfig(full=FullConfig(n_heads=4), gdn=GDNConfig(n_heads=4)),
    )
    model = build_on_meta(config, "reference")
    materialise(model, torch.device("cpu"), seed=0)
    return model


def test_greedy_generation_equals_running_the_whole_sequence_again_each_time(model: LT2) -> None:
    tokens = [3, 1, 4]
    expected = list(tokens)
    for _ in range(12):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert list(generate(model, tokens, max_new_tokens=12, temperature=0)) == expected[3:]


def test_generation_stops_after_the_end_token_and_repeats_with_its_seed(model: LT2) -> None:
    first = list(generate(model, [1, 2], max_new_tokens=30, seed=7))
    assert list(generate(model, [1, 2], max_new_tokens=30, seed=7)) == first
    assert list(generate(model, [1, 2], max_new_tokens=30, seed=8)) != first
    stopped = list(generate(model, [1, 2], max_new_tokens=30, seed=7, eos_id=first[5]))
    assert stopped == first[: first.index(first[5]) + 1]
    with pytest.raises(ValueError, match="prompt has no tokens"):
        list(generate(model, [], max_new_tokens=3))


def test_sampling_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().repeat(40_000, 1)
    generator = torch.Generator().manual_seed(0)

    def frequencies(temperature: float, top_p: float) -> torch.Tensor:
        tokens = sample(logits, temperature=temperature, top_p=top_p, generator=generator)
        return torch.bincount(tokens, minlength=4) / len(tokens)

    torch.testing.assert_close(frequencies(1.0, 1.0), probabilities, atol=0.01, rtol=0)
    squared = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(frequencies(0.5, 1.0), squared, atol=0.01, rtol=0)
    # The fewest tokens that reach 0.7 are the first two; those that reach 0.5 the first alone.
    torch.testing.assert_close(frequencies(1.0, 0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.01, rtol=0)
    assert frequencies(1.0, 0.5)[0] == 1
    assert frequencies(0.0, 1.0)[0] == 1
