"""Trading compute for activation memory: what the looped core keeps for the backward pass."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
import torch._functorch.config
import torch.nn.attention.varlen  # registers torch_attn::_varlen_attn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lt2titan.model.lt2 import LT2
from lt2titan.model.recompute import KEEP_ALL, RecomputePlan
from lt2titan.parallel.config import ActivationCheckpointConfig

logger = logging.getLogger("lt2titan")

KEPT_OPERATORS = frozenset(
    {
        # Matrix products; of float8 ones also the scale, a pass over memory for one number.
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_scaled_mm",
        "aten::max",
        # Softmax attention.
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "torch_attn::_varlen_attn",
        # What has travelled between ranks. Not what was gathered, which is larger than what it was gathered from.
        "_c10d_functional::reduce_scatter_tensor",
        "_c10d_functional::all_reduce",
    }
)
"""Mode selective keeps the outputs of these, and of all operators of this project but RECOMPUTED_OPERATORS."""

RECOMPUTED_OPERATORS = frozenset({"lt2titan::short_convolution", "lt2titan::gated_rms_norm"})
"""Of this project, but no more than a pass over memory, as large as what they read."""


def is_kept(operator: Any) -> bool:
    """Whether mode selective keeps what ``operator`` (an OpOverload or a higher-order operator) returns."""
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    name = operator._schema.name
    return name in KEPT_OPERATORS or (operator.namespace == "lt2titan" and name not in RECOMPUTED_OPERATORS)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # A function of the operator alone: torch 2.11 asks again when it recomputes, torch 2.13 does not.
    return CheckpointPolicy.MUST_SAVE if is_kept(operator) else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = partial(create_selective_checkpoint_contexts, _policy)
"""context_fn of mode selective."""


def recompute_plan(mode: str, skip_last_loops: int) -> RecomputePlan:
    """The core's plan for a mode of `ActivationCheckpointConfig`."""
    if mode in ("none", "memory_budget"):  # the latter is torch.compile's business
        return KEEP_ALL
    return RecomputePlan(
        loops=mode in ("loop", "nested"),
        blocks=mode in ("block", "nested", "selective"),
        n_last_kept=skip_last_loops,
        block_contexts=SELECTIVE if mode == "selective" else None,
    )


def apply_activation_checkpoint(
    model: LT2, mode: str, *, skip_last_loops: int = 0, memory_budget: float = 0.5, is_compiled: bool = False
) -> None:
    """Set the core's plan; arguments as in `ActivationCheckpointConfig`, is_compiled whether blocks will be compiled.

    Raises:
        ConfigError: more loops to skip than the model has, or a memory budget without torch.compile to keep it.
    """
    config = ActivationCheckpointConfig(mode=mode, skip_last_loops=skip_last_loops, memory_budget=memory_budget)  # type: ignore[arg-type]
    config.validate()
    config.validate_model(model.core.n_loops, is_compiled=is_compiled)
    model.core.recompute = recompute_plan(mode, skip_last_loops)
    is_budgeted = mode == "memory_budget"
    # Read whenever a graph is divided into forward and backward; 1 is torch's own choice. Torch recomputes first what
    # has few FLOPs for its bytes, and operators that it does not know, as recurrences, count for none.
    torch._functorch.config.activation_memory_budget = memory_budget if is_budgeted else 1.0
    # Process groups of tensor parallelism are inputs of compiled blocks. Newer torch asks what they weigh: nothing.
    if hasattr(torch._functorch.config, "unsafe_treat_script_objects_as_zero_size"):
        torch._functorch.config.unsafe_treat_script_objects_as_zero_size = True
    details = f", the last {skip_last_loops} loops kept" if skip_last_loops else ""
    logger.info("activation checkpointing: %s%s", mode, f" {memory_budget:g}" if is_budgeted else details)
