"""``[comm]``: what processes talk through. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lt2titan.config.section import require


@dataclass(kw_only=True, slots=True)
class CommConfig:
    """Real communication, or a dry run of a layout."""

    mode: Literal["default", "fake_backend"] = "default"
    """default: NCCL on GPU, gloo on CPU. fake_backend, on the command line or as COMM_MODE: one CPU process takes the
    place of rank 0 of NGPU x NNODES, lays the model out, runs one step on shapes alone and prints sizes; nothing is
    computed, sent or written."""
    device_memory_gib: float = 80.0
    """Memory of the devices that fake_backend stands for; parallelism's "auto" values are chosen by it."""

    def validate(self) -> None:
        require(self.device_memory_gib > 0, self, "device_memory_gib", "must be positive")
