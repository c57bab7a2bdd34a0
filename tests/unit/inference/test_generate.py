"""Sampling and generation against doing it the slow way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lt2titan.inference.generate import generate
from lt2titan.inference.sampling import draws, sample
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
    return model.double()  # so that rounding in batches of other sizes cannot move a draw


PROMPTS = [[3, 1, 4], [5], [9, 2, 6, 5, 3, 5, 8, 9], [7, 7]]


def texts(model: LT2, prompts: Sequence[Sequence[int]], **options: object) -> list[list[int]]:
    """The new tokens of each prompt, gathered as they come."""
    new: list[list[int]] = [[] for _ in prompts]
    for i, token in generate(model, prompts, **options):  # type: ignore[arg-type]
        new[i].append(token)
    return new


def test_greedy_generation_equals_running_the_whole_sequence_again_each_time(model: LT2) -> None:
    expected = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    assert texts(model, PROMPTS, max_new_tokens=12, temperature=0) == expected
    assert texts(model, PROMPTS[:1], max_new_tokens=12, temperature=0) == expected[:1]


def test_a_prompt_in_a_batch_becomes_what_it_becomes_alone(model: LT2) -> None:
    together = texts(model, PROMPTS, max_new_tokens=20, seed=7)
    for i, prompt in enumerate(PROMPTS):
        assert texts(model, [prompt], max_new_tokens=20, seed=7 + i) == [together[i]]
    assert texts(model, [PROMPTS[0]] * 3, max_new_tokens=20, seed=7)[2] != together[0]  # other draws, another text
    assert texts(model, PROMPTS, max_new_tokens=9, seed=7) == [text[:9] for text in together]


def test_each_sequence_stops_after_its_end_token_and_the_others_go_on(model: LT2) -> None:
    endless = texts(model, PROMPTS, max_new_tokens=30, seed=7)
    assert [len(text) for text in endless] == [30] * 4
    eos = endless[1][4]
    ends = [text.index(eos) + 1 if eos in text else 30 for text in endless]
    assert len(set(ends)) > 2  # or the test shows nothing
    assert texts(model, PROMPTS, max_new_tokens=30, seed=7, eos_id=eos) == [
        text[:end] for text, end in zip(endless, ends, strict=True)
    ]


def test_tokens_come_as_they_are_made(model: LT2) -> None:
    """One pass of the model per new token, and none for tokens that nobody has asked for yet or that come after all."""
    n_passes = 0

    def count(*_: object) -> None:
        nonlocal n_passes
        n_passes += 1

    handle = model.register_forward_hook(count)
    new_tokens = generate(model, PROMPTS[:2], max_new_tokens=3, temperature=0)
    passes = [(next(new_tokens)[0], n_passes) for _ in range(6)]
    assert list(new_tokens) == []
    handle.remove()
    assert passes == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)] and n_passes == 3


def test_prompts_that_cannot_be_continued_are_refused_at_the_call(model: LT2) -> None:
    for prompts, reason in (
        ([], "no prompt"),
        ([[1], []], "prompt 1 has no tokens"),
        ([[1, 31]], "from 1 to 31 and the model knows 0 to 30"),
        ([[-1]], "from -1 to -1"),
    ):
        with pytest.raises(ValueError, match=reason):
            generate(model, prompts, max_new_tokens=3)


def test_sampling_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    logits = probabilities.log().repeat(40_000, 1)

    def frequencies(temperature: float, top_p: float) -> torch.Tensor:
        tokens = sample(logits, temperature=temperature, top_p=top_p, uniform=draws(0, len(logits)))
        return torch.bincount(tokens, minlength=4) / len(tokens)

    torch.testing.assert_close(frequencies(1.0, 1.0), probabilities, atol=0.01, rtol=0)
    squared = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(frequencies(0.5, 1.0), squared, atol=0.01, rtol=0)
    # The fewest tokens that reach 0.7 are the likeliest two; those that reach 0.5 the likeliest alone.
    torch.testing.assert_close(frequencies(1.0, 0.7), torch.tensor([0, 0.625, 0, 0.375]), atol=0.01, rtol=0)
    assert frequencies(1.0, 0.45)[1] == 1
    assert frequencies(0.0, 1.0)[1] == 1


def test_draws_at_the_edges() -> None:
    logits = torch.zeros(4, 4)  # probabilities of exactly 1/4
    uniform = torch.tensor([0.0, 0.25, 0.75, 1.0], dtype=torch.float64)  # 1: as if rounding made a sum too small
    assert sample(logits, temperature=1.0, top_p=1.0, uniform=uniform).tolist() == [0, 1, 3, 3]
    assert sample(logits, temperature=1.0, top_p=0.5, uniform=uniform).tolist() == [0, 0, 1, 1]


def test_draws_repeat_with_their_seed_and_do_not_depend_on_how_many_there_are() -> None:
    assert torch.equal(draws(3, 100)[:7], draws(3, 7))
    assert not torch.equal(draws(3, 7), draws(4, 7))
