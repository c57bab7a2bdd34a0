"""How to draw inputs for each recurrence, and the token-by-token definition that it is checked against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.dplr_delta_rule import LOWEST_LOG_DECAY
from lt2titan.kernels.dplr_delta_rule import OPERATOR as DPLR_DELTA_RULE
from lt2titan.kernels.dplr_delta_rule.reference import recurrent_dplr_delta_rule
from lt2titan.kernels.gated_delta_rule import OPERATOR as GATED_DELTA_RULE
from lt2titan.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule
from lt2titan.kernels.gla import OPERATOR as GLA
from lt2titan.kernels.gla.reference import recurrent_gla
from lt2titan.kernels.kda import BOUNDED_OPERATOR as KDA_BOUNDED
from lt2titan.kernels.kda import LOWEST_BOUNDED_LOG_DECAY
from lt2titan.kernels.kda import OPERATOR as KDA
from lt2titan.kernels.kda.reference import recurrent_kda
from lt2titan.kernels.recurrence import Recurrence
from lt2titan.kernels.simple_gla import OPERATOR as SIMPLE_GLA
from lt2titan.kernels.simple_gla.reference import recurrent_simple_gla

Decay = Literal["mixed", "near_one", "near_zero"]


class Sizes(NamedTuple):
    """H query and key heads of width K, HV value heads of width V."""

    H: int
    HV: int
    K: int
    V: int


class Draw:
    """Random per-token tensors (B, L, ...) in fp64; reproducible, and the same on every device."""

    def __init__(self, batch: int, length: int, sizes: Sizes, decay: Decay = "mixed", seed: int = 0) -> None:
        self.batch, self.length, self.sizes, self.decay = batch, length, sizes, decay
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, self.length, *shape, dtype=torch.float64, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.batch, self.length, *shape, dtype=torch.float64, generator=self.generator)

    def unit(self, *shape: int) -> Tensor:
        return F.normalize(self.normal(*shape), dim=-1)

    def log_decay(self, *shape: int) -> Tensor:
        """Logarithms of decays: everywhere in (0, 1), within 1e-3 of 1, or below 1e-2."""
        u = self.uniform(*shape)
        if self.decay == "near_one":
            return -1e-3 * u
        if self.decay == "near_zero":
            return -5 - 15 * u
        return -u / (1.02 - u)  # from 0 to -50, half of them above -1


class RecurrenceCheck(NamedTuple):
    """operator: what is checked. inputs: draws its per-token tensors. definition: one token after another, called
    as definition(*inputs, initial_state, scale, cu_seqlens). grouped_values: whether HV may be a multiple of H.
    sizes: two heads, as wide as in the 1.3B recipes or nearly so."""

    operator: Recurrence
    inputs: Callable[[Draw], list[Tensor]]
    definition: Callable[..., tuple[Tensor, Tensor]]
    grouped_values: bool = False
    sizes: Sizes = Sizes(2, 2, 64, 64)


def _gated_delta_rule(draw: Draw) -> list[Tensor]:
    H, HV, K, V = draw.sizes
    q, k, v = draw.unit(H, K), draw.unit(H, K), draw.normal(HV, V)
    return [q, k, v, draw.log_decay(HV), 2 * draw.uniform(HV)]  # writing strengths up to 2: negative eigenvalues


def _kda(draw: Draw) -> list[Tensor]:
    H, HV, K, V = draw.sizes
    q, k, v = draw.unit(H, K), draw.unit(H, K), draw.normal(HV, V)
    return [q, k, v, draw.log_decay(HV, K), 2 * draw.uniform(HV)]


def _kda_bounded(draw: Draw) -> list[Tensor]:
    q, k, v, g, beta = _kda(draw)
    return [q, k, v, g.clamp(min=LOWEST_BOUNDED_LOG_DECAY), beta]  # near zero: the bound itself, its worst case


def _dplr_delta_rule(draw: Draw) -> list[Tensor]:
    H, _, K, V = draw.sizes
    q, k, v = draw.unit(H, K), draw.normal(H, K) / K**0.5, draw.normal(H, V)
    a = -draw.unit(H, K)
    return [q, k, v, a, -a * draw.uniform(H, K), draw.log_decay(H, K).clamp(min=LOWEST_LOG_DECAY)]  # as in RWKV-7


def _simple_gla(draw: Draw) -> list[Tensor]:
    H, HV, K, V = draw.sizes
    return [draw.unit(H, K), draw.unit(H, K), draw.normal(HV, V), draw.log_decay(HV)]


def _gla(draw: Draw) -> list[Tensor]:
    H, _, K, V = draw.sizes
    return [draw.normal(H, K), draw.normal(H, K) / K**0.5, draw.normal(H, V), draw.log_decay(H, K)]


RECURRENCES = {
    "gated_delta_rule": RecurrenceCheck(
        GATED_DELTA_RULE, _gated_delta_rule, recurrent_gated_delta_rule, True, Sizes(2, 2, 96, 192)
    ),
    "kda": RecurrenceCheck(KDA, _kda, recurrent_kda, True, Sizes(2, 2, 128, 128)),
    "kda_bounded": RecurrenceCheck(KDA_BOUNDED, _kda_bounded, recurrent_kda, True, Sizes(2, 2, 128, 128)),
    "dplr_delta_rule": RecurrenceCheck(DPLR_DELTA_RULE, _dplr_delta_rule, recurrent_dplr_delta_rule),
    "simple_gla": RecurrenceCheck(SIMPLE_GLA, _simple_gla, recurrent_simple_gla, True, Sizes(1, 2, 64, 256)),
    "gla": RecurrenceCheck(GLA, _gla, recurrent_gla, sizes=Sizes(2, 2, 256, 128)),  # GLA's keys, HGRN2's values
}
