"""A way to lay a model out over devices, in numbers."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """Degrees of parallelism, and how FSDP2 treats a looped stack (see parallel/fsdp.py).

    n_shards: ranks that parameters are sharded over; those that share rows (n_context) are among them.
    """

    n_replicas: int = 1
    n_shards: int = 1
    n_context: int = 1
    n_tensor: int = 1
    sequence_parallel: bool = True
    loop_reshard: str = "per_step"
    defers_reductions: bool = False
    cpu_offload: bool = False

    @property
    def n_token_shares(self) -> int:
        """Ranks that each have a part of the tokens of the residual stream (sequence parallelism)."""
        return self.n_tensor if self.sequence_parallel else 1
