"""``[activation_checkpoint]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True, slots=True)
class ActivationCheckpointConfig:
    """Trading compute for activation memory, which grows with the executed depth n_layers x n_loops."""

    mode: Literal["none", "block"] = "none"
    """none keeps every activation; block keeps each block's input in each loop and computes the rest again."""

    def validate(self) -> None:
        pass  # the type says it all
