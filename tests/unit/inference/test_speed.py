"""Tokens per second, with a clock that the test moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lt2titan.inference import speed
from lt2titan.inference.speed import Speed


def test_reading_prompts_and_adding_tokens_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)

    def new_tokens() -> Iterator[tuple[int, int]]:
        nonlocal now
        now += 4  # reads the prompts
        yield 0, 5
        yield 1, 5
        now += 1  # a pass
        yield 0, 5
        yield 1, 5
        now += 1
        yield 1, 5

    result = Speed()
    for _ in range(2):
        for _ in result.timed(new_tokens(), [[1, 2, 3], [4]]):
            now += 100  # printing is not the model's time
    assert (result.prefill_tokens, result.prefill_seconds) == (8, 8)
    assert (result.decode_tokens, result.decode_seconds) == (6, 4)
    assert str(result) == "prefill 8 tokens, 1 tokens/s, decode 6 tokens, 2 tokens/s"
