"""Lets fla's Triton kernels run on a CPU, through Triton's interpreter (TRITON_INTERPRET=1).

Three things stand in the way with Triton 3.7. Autotuning needs a GPU driver for its benchmarks: every kernel keeps only
its first configuration. And `range` inside a kernel is Python's own, whose indices lack a tensor's methods (`.to`) and
whose bounds may be tensors: the kernels get a `range` that yields interpreter tensors. `tl.gather` under another name
(fla.ops.utils.op) is not the one that the interpreter replaces: the kernels get one that looks it up when called.
"""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Iterator
from typing import Any


def install() -> None:
    """Call once, before any operator runs on fla. Imports triton and fla."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    import triton.language as tl
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.__init__

    def init(self: Any, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        original(self, fn, arg_names, configs[:1], *args, **kwargs)

    Autotuner.__init__ = init

    import fla.modules.causal_conv1d.ops
    import fla.modules.norm.fused_norm_gate
    import fla.ops.gated_delta_rule
    import fla.ops.generalized_delta_rule.dplr
    import fla.ops.gla
    import fla.ops.kda.chunk_intra

    # On a GPU a product of three bf16 parts; the interpreter knows no such precision.
    fla.ops.kda.chunk_intra.SAFE_GATE_DOT_PRECISION = tl.constexpr("ieee")

    patch_loops()


def patch_loops() -> None:
    """Give `range` and `gather` to the kernels of every module of fla that has been imported so far."""
    import triton.language as tl

    for name, module in list(sys.modules.items()):
        if name.startswith("fla.") and getattr(module, "tl", None) is tl:
            module.range = _range  # type: ignore[attr-defined]
            if hasattr(module, "gather"):
                module.gather = _gather  # type: ignore[attr-defined]


def _gather(src: Any, index: Any, axis: int) -> Any:
    import triton.language as tl

    return tl.gather(src, index, axis)


def _range(*bounds: Any) -> Iterator[Any]:
    if "kernel" not in sys._getframe(1).f_code.co_name:  # host code of the same module
        yield from builtins.range(*bounds)
        return
    from triton.runtime.interpreter import interpreter_semantic

    for i in builtins.range(*(int(b.handle.data.item()) if hasattr(b, "handle") else int(b) for b in bounds)):
        yield interpreter_semantic.to_tensor(i)
