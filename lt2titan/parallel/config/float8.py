"""``[float8]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lt2titan.config.section import require


@dataclass(kw_only=True, slots=True)
class Float8Config:
    """Matrix products of the blocks in float8 (torchao), for GPUs that have it (NVIDIA Ada, Hopper or newer)."""

    recipe: Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"] = "none"
    """tensorwise scales a whole tensor by one number: the fastest. rowwise has a scale per row: more exact.
    rowwise_with_gw_hp also keeps the product that makes the gradient of the weights in bfloat16."""

    filter_fqns: list[str] = field(default_factory=list)
    """Linear maps to leave alone: every one whose name (core.blocks.0.ffn.gate_proj) contains one of these."""

    min_size: int = 256
    """Leave maps alone that have a side below it: decays, gates per head and low-rank maps gain nothing and are the
    ones that need precision. The head, and sides that are no multiple of 16, are always left alone."""

    auto_filter: bool = True
    """Leave maps alone that are too small to be faster in float8, as torchao measured on H100."""

    all_gather: Literal["auto", "on", "off"] = "auto"
    """Ranks cast their shards and FSDP2 gathers float8: half the traffic, and a weight is cast once per step, not once
    in every loop. Only tensorwise; auto is on where it can be."""

    emulate: bool = False
    """Compute products of float8 values in the original dtype: slow, for tests, and the only way on a CPU."""

    allow_eager: bool = False
    """Run on a GPU without compile.enable: casts that are not fused with what is around cost more than is saved."""

    def validate(self) -> None:
        require(self.min_size >= 1, self, "min_size", "must be at least 1")
        require(all(self.filter_fqns), self, "filter_fqns", 'an empty name would leave every map alone; remove ""')
        require(
            self.all_gather != "on" or self.recipe == "tensorwise",
            self,
            "all_gather",
            f'needs float8.recipe = "tensorwise", and it is {self.recipe!r}; use "auto"',
        )
