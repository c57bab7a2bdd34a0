"""Text from tokens that come one at a time."""

from __future__ import annotations

from collections.abc import Sequence

from lt2titan.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet."""


class TextStream:
    """The text after a prompt, piece by piece: the pieces and `end` together are what follows the prompt's text.

    A token may hold part of a character, and a decoder may write a token differently at the start of a text. So each
    piece is what a few tokens more add to the text of those before them, kept back until its last character is whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before, self._new = list(prompt), list[int]()

    def push(self, token: int) -> str:
        """The text that ``token`` completes, "" if none."""
        self._new.append(token)
        text = self._text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._before, self._new = self._new, []
        return text

    def end(self) -> str:
        """What was kept back; bytes that never became a character are U+FFFD."""
        text = self._text()
        self._before, self._new = self._before + self._new, []
        return text

    def _text(self) -> str:
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._new)[len(known) :]
