"""How fast tokens were read and made."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass
class Speed:
    """Tokens and seconds of the passes that read prompts, and of those that add a token."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def timed(
        self, new_tokens: Iterator[tuple[int, int]], prompts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, int]]:
        """``new_tokens`` of `generate`: each prompt's first token is known once the prompts are read."""
        last = time.perf_counter()
        for n_before, new in enumerate(new_tokens):
            now = time.perf_counter()
            if n_before == 0:
                self.prefill_tokens += sum(map(len, prompts))
                self.prefill_seconds += now - last
            elif n_before >= len(prompts):
                self.decode_tokens += 1
                self.decode_seconds += now - last
            yield new
            last = time.perf_counter()  # what is done with the token is not counted

    def __str__(self) -> str:
        parts = [("prefill", self.prefill_tokens, self.prefill_seconds)]
        if self.decode_tokens:
            parts.append(("decode", self.decode_tokens, self.decode_seconds))
        return ", ".join(f"{name} {n:,} tokens, {n / seconds:,.0f} tokens/s" for name, n, seconds in parts)
