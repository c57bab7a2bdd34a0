"""Named ranges in a profiler trace: what the trainer is doing, and which loop and block a forward pass is in.

`trace_summary` reads these names again; a backward pass needs none, because a trace joins every backward operation to
its forward operation. Nothing here changes what is computed.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.profiler import record_function

from lt2titan.model.block import Block
from lt2titan.model.context import Context
from lt2titan.model.looped_core import LoopedCore, LoopObserver
from lt2titan.model.lt2 import LT2


def phase(name: str) -> AbstractContextManager[Any]:
    """Name a part of the training step in traces; phases must not be nested. Without a profiler it costs 2 us."""
    return record_function(f"phase {name}")


class LoopRanges(LoopObserver):
    """Ranges "loop T" (from 1) and within them "loop T block I KIND" (I as in the parameter names), until detached.

    It hooks the core, not the blocks: a hook on a compiled block would be compiled with it. Whoever observes the core
    already goes on seeing everything.
    """

    def __init__(self, model: LT2) -> None:
        self._core, self._kinds = model.core, model.config.layer_mixers
        self._observer: LoopObserver | None = None
        self._open: list[record_function] = []  # the outer one first
        self._n_loops = self._block = 0
        self._hooks = [
            model.core.register_forward_pre_hook(self._enter_core, with_kwargs=True),
            model.core.register_forward_hook(self._leave_core, always_call=True),
        ]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter_core(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(LoopedCore.forward).bind(core, *args, **kwargs).arguments
        self._n_loops = given.get("n_loops", 0) or self._core.n_loops
        self._observer, self._core.observer = self._core.observer, self
        self._open_loop(0)

    def _leave_core(self, core: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while self._open:  # after an error
            self._close()
        self._core.observer, self._observer = self._observer, None

    def after_block(self, block: Block, x: Tensor, context: Context) -> None:
        self._close()
        if self._observer is not None:
            self._observer.after_block(block, x, context)
        self._block += 1
        if self._block < len(self._kinds):
            self._enter(f"{self._loop_name} block {self._block} {self._kinds[self._block]}")

    def after_loop(self, loop: int, before: Tensor, after: Tensor, rho: Tensor | None) -> None:
        self._close()
        if self._observer is not None:
            self._observer.after_loop(loop, before, after, rho)
        if loop + 1 < self._n_loops:
            self._open_loop(loop + 1)

    def _open_loop(self, loop: int) -> None:
        self._loop_name, self._block = f"loop {loop + 1}", 0
        self._enter(self._loop_name)
        self._enter(f"{self._loop_name} block 0 {self._kinds[0]}")

    def _enter(self, name: str) -> None:
        self._open.append(record_function(name))
        self._open[-1].__enter__()

    def _close(self) -> None:
        self._open.pop().__exit__(None, None, None)
