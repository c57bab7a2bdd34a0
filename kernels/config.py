"""The `[kernels]` section. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lt2titan.config.section import require


@dataclass(kw_only=True, slots=True)
class KernelsConfig:
    """Which implementation computes the operators."""

    backend: Literal["auto", "reference", "fla"] = "auto"
    """'fla' is Triton kernels (CUDA): flash-linear-attention's of recurrences, short convolution and gated norm, this
    project's of sparse attention. 'reference' is plain PyTorch (any device, slow on a GPU), 'auto' takes fla on CUDA
    and the reference elsewhere."""

    def validate(self) -> None:
        known = ("auto", "reference", "fla")
        require(self.backend in known, self, "backend", f"must be one of {', '.join(known)}")
