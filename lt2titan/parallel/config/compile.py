"""``[compile]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True, slots=True)
class CompileConfig:
    """torch.compile of the blocks, one graph for all loops and layers of a kind, and of the loss."""

    enable: bool = False
    """Compile before the first step: worth it on a GPU, where it takes a minute or so whatever n_loops is. On a CPU it
    seldom pays."""
    backend: Literal["inductor", "aot_eager"] = "inductor"
    """inductor generates kernels (on a CPU it needs a C++ compiler); aot_eager only captures graphs: no faster than
    without, for tests and to tell errors of the one from the other's."""
    error_on_recompile: bool = False
    """End the run when anything is compiled after the first step began, naming what changed; by default that is a
    warning. Recompiling stalls all ranks for as long as the first time."""

    def validate(self) -> None:
        pass  # the types say it all
