"""``[activation_checkpoint]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lt2titan.config.section import ConfigError, require

Mode = Literal["none", "block", "selective", "loop", "nested", "memory_budget"]
SCOPED_MODES = ("block", "selective", "loop", "nested")
"""The modes that checkpoint scopes of the core, loop by loop."""


@dataclass(kw_only=True, slots=True)
class ActivationCheckpointConfig:
    """Trading compute for activation memory, which grows with the executed depth n_layers x n_loops."""

    mode: Mode = "none"
    """What is kept for the backward pass; the rest is computed again. none: everything. block: each block's input in
    each loop. selective: beside that, the outputs of matrix products, attention and recurrences. loop: each loop's
    input. nested: as loop, and block inside of a loop that is computed again (the least memory; every block runs three
    times forward). memory_budget: what torch.compile chooses within memory_budget (needs compile.enable; it takes
    recurrences to be cheap)."""
    skip_last_loops: int = 0
    """Loops at the end of which everything is kept; with the modes block, selective, loop and nested."""
    memory_budget: float = 0.5
    """Of mode memory_budget: part of a compiled block's activations to keep, from 0 (as block) to 1 (as none)."""

    def validate(self) -> None:
        require(self.skip_last_loops >= 0, self, "skip_last_loops", "must be positive, or 0 for none")
        require(
            not self.skip_last_loops or self.mode in SCOPED_MODES,
            self,
            "skip_last_loops",
            f"mode {self.mode!r} does not recompute by loops; set it to 0, or mode to one of {list(SCOPED_MODES)}",
        )
        require(0 <= self.memory_budget <= 1, self, "memory_budget", "must lie between 0 and 1")

    def validate_model(self, n_loops: int, *, is_compiled: bool) -> None:
        """Refuse what cannot be done with a model of ``n_loops`` loops, or unless its blocks are compiled."""
        if self.skip_last_loops > n_loops:
            reason = f"the model has {n_loops} loops (model.n_loops); use at most that many"
            raise ConfigError("skip_last_loops", self.skip_last_loops, reason)
        if self.mode == "memory_budget" and not is_compiled:
            reason = "torch.compile is what keeps the budget: set compile.enable = true, or choose selective"
            raise ConfigError("mode", self.mode, reason)
