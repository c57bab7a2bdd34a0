"""What a compiled block keeps for its backward pass, in bytes: torch.compile divides its graph itself, as on a GPU,
and no kernel is made. For parallel/activation_memory.py."""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.graph import saved_tensors_hooks

from lt2titan.model.block import Block
from lt2titan.model.context import Carry, Context
from lt2titan.model.recompute import Contexts


def saved_by_compiled(
    block: Block,
    h: Tensor,
    context: Context,
    carry: Carry,
    *,
    recompute: Contexts | None = None,
    memory_budget: float = 1.0,
) -> list[Tensor]:
    """Tensors that the block, compiled with inductor, would save, its inputs among them; call it in a FakeTensorMode.

    Inductor decomposes operators, simplifies the graph of both passes and weighs what is cheap to compute again while
    kernels are fused; all of that happens before kernels are generated, and happens here.

    Args:
        block: with fake parameters, its attributes as in training: by that the partitioner knows what costs nothing to
            save. (Where FSDP2 gathers float8, torch 2.11 and 2.13 take only some of them for such, and have each visit
            keep transposed copies of others' numbers, which counts.)
        recompute, memory_budget: of the checkpointing modes selective and memory_budget.
    """
    from torch._inductor.compile_fx import partition_fn  # slow to import
    from torch._inductor.decomposition import select_decomp_table

    def without_kernels(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        return graph

    backend = aot_autograd(
        fw_compiler=without_kernels,
        bw_compiler=without_kernels,
        partition_fn=partition_fn,
        decompositions=select_decomp_table(),
    )

    def call(h: Tensor, context: Context, carry: Carry) -> tuple[Tensor, Carry]:
        return block(h, context, carry, recompute=recompute)  # type: ignore[no-any-return]

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
            compiled(h, context, carry)
    finally:
        reset_code(call.__code__)  # else the next call might find this graph, which another budget divides otherwise
    return saved
