"""torchao's float8 linear map as one of ours, whose weight FSDP2 may gather in float8. Imports torchao."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear as TorchaoLinear
from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
from torchao.float8.float8_training_tensor import Float8TrainingTensor
from torchao.float8.float8_utils import amax_to_scale, to_fp8_saturated
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor as TorchaoShard

from lt2titan.model.layers import Linear
from lt2titan.model.shares import local


class Float8Linear(TorchaoLinear, Linear):  # type: ignore[misc]  # torchao has no types
    """A `Linear` (initialisation, parameter names, shares of a tensor-parallel weight) that multiplies in float8."""

    scale: Tensor | None = None
    """Of the whole weight, if it is gathered in float8; see `update_scales`."""
    keeps_cast = False
    cast: Tensor | None = None
    """This rank's shard in float8, if it was gathered since the last `update_scales`, which said to keep it."""

    def __init__(self, in_features: int, out_features: int, bias: bool, config: Float8LinearConfig) -> None:
        """As torchao's from_float calls it; ours have no bias."""
        super().__init__(in_features, out_features, init_std=0.0, config=config)  # type: ignore[call-arg]  # torchao takes config

    def forward(self, x: Tensor) -> Tensor:
        weight = local(self.weight).t()
        return matmul_with_hp_or_float8_args.apply(x, weight, self.linear_mm_config, self.config)  # type: ignore[no-any-return]


class Float8Shard(TorchaoShard):  # type: ignore[misc]  # torchao has no types
    """torchao's wrapper of a shard of a weight, which may be kept in float8 when it was gathered (`update_scales`), and
    for numbers of ranks that do not divide its rows, whose shards are padded."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        return tree_map_only(TorchaoShard, lambda t: cls(t._tensor, t._linear_mm_config, t._dtype), out)

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: Float8Linear,
        mp_policy: Any,
    ) -> tuple[tuple[Tensor], tuple[Tensor]]:
        """What FSDP2 gathers over ``mesh``, and what the gathered weight, (outer_size), needs beside it."""
        if module.scale is None:
            raise RuntimeError("weights that are gathered in float8 have no scales yet: call update_scales first")
        data = module.cast
        if data is None:
            # torchao's hp_tensor_and_scale_to_float8 without its autograd, which took the host 30 us per weight.
            data = to_fp8_saturated(self._tensor.float() * module.scale, self._dtype)
            n_missing = -(-outer_size[0] // mesh.size()) - data.shape[0]
            if n_missing:  # F.pad knows no float8
                data = F.pad(data.view(torch.uint8), (0, 0, 0, n_missing)).view(self._dtype)
            module.cast = data if module.keeps_cast else None
        return (data,), (module.scale,)


def to_float8(linear: Linear, config: Float8LinearConfig, is_gathered_in_float8: bool) -> Float8Linear:
    """The same map with the same parameter (in a wrapper, if FSDP2 is to gather it in float8)."""
    converted: Float8Linear = Float8Linear.from_float(linear, config)
    converted.init_std = linear.init_std
    if is_gathered_in_float8:
        dtype = config.cast_config_weight.target_dtype
        converted.weight = nn.Parameter(Float8Shard(linear.weight, converted.linear_mm_config, dtype))
    return converted


@torch.no_grad()
def update_scales(model: nn.Module, keeps_casts: bool) -> None:
    """Compute the scales of all weights that are gathered in float8, with one all-reduce over all ranks. Call it on
    each of them whenever weights have changed: until then the values of the last call are gathered.

    Args:
        keeps_casts: each rank keeps its shards in float8, once they are cast, for weights that are gathered again.

    Raises:
        RuntimeError: weights are gathered: their shards are out of sight.
    """
    linears: list[Float8Linear] = []
    shards, device = [], torch.device("cpu")
    for module in model.modules():
        if not isinstance(module, Float8Linear):
            continue
        weight: Any = module.weight
        shard = weight._local_tensor if isinstance(weight, DTensor) else weight
        if isinstance(shard, Float8TrainingTensor):
            raise RuntimeError("weights are gathered: call lt2titan.parallel.fsdp.reshard before update_scales")
        if isinstance(shard, Float8Shard):
            linears.append(module)
            # A rank may have no rows of a weight.
            shards.append(shard._tensor if shard.numel() else shard._tensor.new_zeros(1))
            device = torch.device(weight.device_mesh.device_type)  # not the shards', if they are offloaded
    if not linears:
        return
    amax = torch.stack(torch._foreach_norm(shards, ord=torch.inf)).to(device)
    dist.all_reduce(amax, dist.ReduceOp.MAX)
    config: Any = linears[0].config
    scales = amax_to_scale(amax, config.cast_config_weight.target_dtype)
    # Each at an address that 16 bytes divide, or inductor's graphs copy it at every visit (`get_input_idxs_to_check`).
    aligned = F.pad(scales[:, None], (0, 16 // scales.itemsize - 1))[:, 0]
    for linear, scale in zip(linears, aligned.unbind(), strict=True):
        linear.scale, linear.keeps_cast, linear.cast = scale, keeps_casts, None
