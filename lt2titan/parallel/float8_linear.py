"""torchao's float8 linear map as one of ours. Imports torchao."""

from __future__ import annotations

from torch import Tensor
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear as TorchaoLinear
from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

from lt2titan.model.layers import Linear
from lt2titan.model.shares import local


class Float8Linear(TorchaoLinear, Linear):  # type: ignore[misc]  # torchao has no types
    """A `Linear` (initialisation, parameter names, shares of a tensor-parallel weight) that multiplies in float8."""

    def __init__(self, in_features: int, out_features: int, bias: bool, config: Float8LinearConfig) -> None:
        """As torchao's from_float calls it; ours have no bias."""
        super().__init__(in_features, out_features, init_std=0.0, config=config)  # type: ignore[call-arg]  # torchao takes config

    def forward(self, x: Tensor) -> Tensor:
        weight = local(self.weight).t()
        return matmul_with_hp_or_float8_args.apply(x, weight, self.linear_mm_config, self.config)  # type: ignore[no-any-return]


def to_float8(linear: Linear, config: Float8LinearConfig) -> Float8Linear:
    """The same map with the same parameter (in torchao's wrapper, with config.enable_fsdp_float8_all_gather)."""
    converted: Float8Linear = Float8Linear.from_float(linear, config)
    converted.init_std = linear.init_std
    return converted
