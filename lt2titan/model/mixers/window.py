"""Softmax attention over the last w tokens."""

from __future__ import annotations

from lt2titan.model.mixers.base import Common
from lt2titan.model.mixers.config import WindowConfig
from lt2titan.model.mixers.full import Full


class Window(Full):
    """As Full, but a token sees the last ``window`` keys, itself included."""

    def __init__(self, config: WindowConfig, common: Common) -> None:
        super().__init__(config, common)
        self.window = config.window
