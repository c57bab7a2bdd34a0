"""What a compiled block keeps for its backward pass, in bytes: torch.compile divides its graph itself, as on a GPU,
and no kernel is made. For parallel/activation_memory.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from lt2titan.model.block import Block
from lt2titan.model.context import Carry, Context
from lt2titan.model.recompute import Contexts


def saved_by_compiled(
    block: Block,
    parameters: dict[str, Tensor],
    h: Tensor,
    context: Context,
    carry: Carry,
    *,
    recompute: Contexts | None = None,
    memory_budget: float = 1.0,
) -> list[Tensor]:
    """Tensors that the block, compiled with inductor, would save, its inputs among them; call it in a FakeTensorMode.

    Inductor decomposes operators and weighs what is cheap to compute again while kernels are fused; both happen before
    kernels are generated, and happen here.

    Args:
        parameters: of the block, by name.
        recompute, memory_budget: of the checkpointing modes selective and memory_budget.
    """
    from torch._inductor.decomposition import select_decomp_table  # slow to import

    def without_kernels(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        return graph

    backend = aot_autograd(
        fw_compiler=without_kernels,
        bw_compiler=without_kernels,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )

    def call(parameters: dict[str, Tensor], h: Tensor, context: Context, carry: Carry) -> tuple[Tensor, Carry]:
        return functional_call(block, parameters, (h, context, carry), {"recompute": recompute})  # type: ignore[no-any-return]

    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=False)
    try:
        with (
            torch._functorch.config.patch(activation_memory_budget=memory_budget),
            saved_tensors_hooks(keep, lambda t: t),
        ):
            compiled(parameters, h, context, carry)
    finally:
        reset_code(call.__code__)  # else the next call might find this graph, which another budget divides otherwise
    return saved
