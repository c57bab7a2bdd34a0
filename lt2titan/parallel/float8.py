"""Matrix products in float8 (torchao), for the linear maps of the blocks that gain by it.

With float8 all-gather, shards are cast before FSDP2 gathers them: once per step, on one GPU too, whatever the numbers
of loops, microbatches and gathers. Without it every visit casts the weight again, forward and backward.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import nn

from lt2titan.config.section import ConfigError
from lt2titan.model.layers import Linear, WholeLinear
from lt2titan.model.lt2 import LT2
from lt2titan.parallel.config.float8 import Float8Config

logger = logging.getLogger("lt2titan")

MULTIPLE = 16
"""Of which both sides of a float8 product must be multiples, on NVIDIA GPUs."""


@dataclass(frozen=True)
class Float8Plan:
    """``[float8]`` as it runs: what was "auto" is decided."""

    recipe: str
    filter_fqns: Sequence[str] = ()
    min_size: int = 256
    auto_filter: bool = True
    all_gather: bool = False
    emulate: bool = False


def plan_float8(
    section: Float8Config,
    *,
    device: torch.device | None,
    compiled: bool,
    n_tokens: int,
) -> Float8Plan | None:
    """What to apply; None for none.

    Args:
        device: that must be able to run it; None asks for none.
        n_tokens: of a microbatch on one rank, over which the gradient of a weight is summed: a side of that product.
            Batches without gradients (validation) may have any number, which is then no side that is summed over.

    Raises:
        ConfigError: it cannot run here, or would only slow training down.
    """
    recipe = section.recipe
    if recipe == "none":
        return None
    if find_spec("torchao") is None:
        raise ConfigError("float8.recipe", recipe, 'needs torchao: pip install "torchao>=0.17", or set it to "none"')
    if not section.emulate:
        if device is not None:
            _check_device(recipe, device)
        if not compiled and not section.allow_eager:
            reason = (
                "is slower than bfloat16 without compilation; set compile.enable, or float8.allow_eager to run it so"
            )
            raise ConfigError("float8.recipe", recipe, reason)
        if n_tokens % MULTIPLE and recipe != "rowwise_with_gw_hp":
            reason = (
                f"a microbatch has {n_tokens} tokens per rank (local_batch_size x seq_len / context ranks) and "
                f'needs a multiple of {MULTIPLE}; change them, or use "rowwise_with_gw_hp"'
            )
            raise ConfigError("float8.recipe", recipe, reason)
    return Float8Plan(
        recipe=recipe,
        filter_fqns=section.filter_fqns,
        min_size=section.min_size,
        auto_filter=section.auto_filter,
        all_gather=recipe == "tensorwise" and section.all_gather != "off",
        emulate=section.emulate,
    )


def _check_device(recipe: str, device: torch.device) -> None:
    if device.type != "cuda":
        reason = 'products in float8 need a GPU; set float8.emulate (slow, for tests), or recipe = "none"'
        raise ConfigError("float8.recipe", recipe, reason)
    needed = (8, 9) if recipe == "tensorwise" else (9, 0)
    if torch.cuda.get_device_capability(device) < needed:
        name = torch.cuda.get_device_name(device)
        reason = f'needs a GPU of compute capability {needed[0]}.{needed[1]}, and this is {name}; set it to "none"'
        raise ConfigError("float8.recipe", recipe, reason)


def apply_float8(model: LT2, plan: Float8Plan, n_tensor: int = 1) -> None:
    """Let the linear maps of ``model``, on ``meta``, that qualify multiply in float8, in place; everything else that
    lays it out comes after. Parameter names and initial values stay.

    Args:
        n_tensor: ranks over which tensor parallelism will split the maps.

    Raises:
        ConfigError: none qualifies.
    """
    from torchao.float8 import Float8LinearConfig

    from lt2titan.parallel.float8_linear import to_float8

    config = replace(Float8LinearConfig.from_recipe_name(plan.recipe), emulate=plan.emulate)
    n_maps = sum(isinstance(module, Linear) for module in model.modules())
    qualifying = list(_qualifying(model, plan, n_tensor))
    if not qualifying:
        reason = (
            f"no linear map of this model qualifies, of {n_maps} (see float8.filter_fqns, min_size and auto_filter); "
            'set it to "none"'
        )
        raise ConfigError("float8.recipe", plan.recipe, reason)
    for name, linear in qualifying:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, to_float8(linear, config, plan.all_gather))
    if plan.recipe != "tensorwise":
        # RMSNorm, rowwise scales and checkpointing, fused by inductor, gave NaN: intermediate values keep a precision
        # that the eager computation rounds away (https://github.com/pytorch/pytorch/issues/150859).
        torch._inductor.config.emulate_precision_casts = True
    logger.info(
        "float8: %s%s, %d of %d linear maps%s",
        plan.recipe,
        " (emulated)" if plan.emulate else "",
        len(qualifying),
        n_maps,
        ", weights gathered in float8" if plan.all_gather else ", weights cast at every visit",
    )


def update_scales(model: nn.Module, loop_reshard: str) -> None:
    """`float8_linear.update_scales`, for callers that have no torchao unless they need it.

    Args:
        loop_reshard: as in `apply_fsdp`: what is gathered once per step need not be kept in float8 beside it.
    """
    from lt2titan.parallel import float8_linear

    float8_linear.update_scales(model, keeps_casts=loop_reshard != "per_step")


def gathered_bytes(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> int:
    """What FSDP2 gathers of ``parameters`` where it computes in ``dtype``."""
    return sum(p.numel() * (1 if _is_gathered_in_float8(p) else dtype.itemsize) for p in parameters)


def float8_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Of those of ``parameters`` that FSDP2 gathers in float8."""
    return sum(p.numel() for p in parameters if _is_gathered_in_float8(p))


def zeros_as_gathered(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """As a block's forward pass meets it: zeros of ``parameter``'s shape in ``dtype``, or in float8 with a scale."""
    if not _is_gathered_in_float8(parameter):
        return nn.Parameter(torch.zeros(parameter.shape, dtype=dtype))
    data = torch.zeros(parameter.shape, dtype=torch.float8_e4m3fn)
    weight, _ = parameter.fsdp_post_all_gather((data,), (torch.ones(()),), dtype)  # type: ignore[attr-defined]
    return nn.Parameter(weight)


def _is_gathered_in_float8(parameter: nn.Parameter) -> bool:
    """Whether it is in torchao's wrapper, which tells FSDP2 by this method what to gather."""
    return hasattr(parameter, "fsdp_pre_all_gather")


def _qualifying(model: LT2, plan: Float8Plan, n_tensor: int) -> Iterator[tuple[str, Linear]]:
    multiple = MULTIPLE * n_tensor  # of a side that is split, and it is not known here which will be
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or not name.startswith("core."):
            continue
        if isinstance(module, WholeLinear):  # indexers, whose scores are compared with each other
            continue
        if any(part in name for part in plan.filter_fqns):
            continue
        n, k = module.out_features, module.in_features
        if n % multiple or k % multiple or min(n, k) < plan.min_size:
            continue
        if plan.auto_filter and not _pays(plan.recipe, n, k):
            continue
        yield name, module


def _pays(recipe: str, n: int, k: int) -> bool:
    """Whether a map from k to n features is faster than in bfloat16 on H100: the thresholds of torchao 0.18
    (`_auto_filter_for_recipe`), which has none for rowwise_with_gw_hp, slower than rowwise: the same serve."""
    if recipe == "tensorwise":
        return k > 4096 or n > 1024
    return n > 2048 and k > 1024 and (n > 4096 or k > 2048)
