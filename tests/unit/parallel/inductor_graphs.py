"""torch.compile's own graphs without its kernels, for tests of what they keep for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx


def inductor_without_kernels(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """As a backend: its graphs as they are before kernels are made of them, which takes the most time."""
    return compile_fx(graph, inputs, inner_compile=lambda graph, inputs, **options: make_boxed_func(graph))
