"""torch.compile: a graph for each kind of block, gradient mode and attention window, used by all its layers and loops.

Blocks are compiled, not the core: compile time does not depend on the number of loops, a step may run fewer of them,
and gradients of one loop are not in one graph with those of another (which takes more memory than eager execution,
https://github.com/pytorch/pytorch/issues/193193). Each graph is whole (fullgraph) and of static shapes, so that a batch
of another shape would be a graph more; batches are therefore padded, boundaries of documents included.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters, get_compilation_metrics

from lt2titan.model.head import chunk_loss_sum
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.dsa import DSA
from lt2titan.model.mixers.full import Full
from lt2titan.parallel.fsdp import reshard

logger = logging.getLogger("lt2titan")

GRAPHS_PER_KIND = 8
"""Graphs that a kind of block (with one window) may need at most: with gradients, kept or recomputed; without, in the
shape of training (loops that gradients do not reach) or of validation; and each once more when a batch has more
documents than there was room for."""

WAYS_OUT = (
    "Shapes must be those that the run began with: if cu_seqlens or chunk_indices grew, raise "
    "data.max_documents_per_sample. TORCH_LOGS=recompiles_verbose says why none of the graphs fits"
)


class RecompileError(RuntimeError):
    """Something was compiled after the warm-up, and compile.error_on_recompile is set."""


def apply_compile(model: LT2, backend: str) -> None:
    """Compile every block and the loss in place, when they first run; parameter names do not change.

    Sets the compiler up for this process: how many graphs a function may have, and what looped blocks need.

    Args:
        backend: "inductor" or "aot_eager".
    """
    n_graphs = _n_kinds_and_windows(model)
    # All blocks share one code object, and so its limit (8 by default), beyond which fullgraph raises.
    limit = GRAPHS_PER_KIND * n_graphs
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(256, limit)
    # With several graphs of one code object, the most recently used one is tried first, and a repetition in the
    # backward pass can find another that fits than the first time: checkpointing then misses tensors
    # (https://github.com/pytorch/pytorch/issues/166926).
    torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]
    # Graphs hold for one number of threads. Once set, it is autograd's threads' as well, in which blocks run again;
    # they can have another by default (https://github.com/ecmwf/anemoi-core/issues/1330).
    torch.set_num_threads(torch.get_num_threads())
    for block in model.core.blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    model.chunk_loss = torch.compile(chunk_loss_sum, backend=backend, fullgraph=True, dynamic=False)
    logger.info(
        "torch.compile: %d blocks as %d graphs (kinds x windows) for each gradient mode, and the loss, with %s",
        len(model.core.blocks),
        n_graphs,
        backend,
    )


def _n_kinds_and_windows(model: LT2) -> int:
    """Kinds of blocks, softmax ones times the windows that they are given, those that choose what they see times the
    ways to (everything or the chosen, and these anew or from an earlier loop); a kind is a mixer and its parameters."""
    n_windows, n_ways = len(_windows(model)), 4 if model.core.reuse_every > 1 else 2
    kinds = {(type(block.mixer), _shapes(block)) for block in model.core.blocks}
    return sum(n_windows if issubclass(mixer, Full) else n_ways if mixer is DSA else 1 for mixer, _ in kinds)


def _windows(model: LT2) -> set[int | None]:
    return {model.core.window(loop) for loop in range(model.core.n_loops)}


def _shapes(block: nn.Module) -> frozenset[tuple[str, torch.Size]]:
    return frozenset((name, parameter.shape) for name, parameter in block.named_parameters())


class RecompileWatch:
    """Compiles everything before the first step, then says what is compiled after that all the same, or refuses it.

    Args:
        is_error: raise, not warn.
    """

    def __init__(self, is_error: bool) -> None:
        self.is_error = is_error
        self.n_warm_up_graphs = 0
        """Compiled by `warm_up`."""
        self.warm_up_seconds = 0.0
        """What `warm_up` took, its passes through the model and the tuning of kernels included."""
        self.n_recompiled = 0
        """Graphs compiled since then, as seen by `check`."""
        self._n_graphs, self._since = _n_graphs(), time.time()

    def warm_up(
        self,
        model: LT2,
        training: dict[str, Any],
        validation: dict[str, Any] | None,
        loops: Collection[tuple[int, int]],
        phases: Sequence[bool] = (False,),
    ) -> None:
        """Run forward and backward passes that leave no trace but graphs, and log how long it took.

        Every rank must call it.

        Args:
            training: arguments of LT2.forward that have the shapes of a microbatch; targets may all be ignored.
            validation: the same of a validation batch; None if there is no validation.
            loops: (n_loops, n_backward_loops) of the steps to come. The most loops need all graphs, except where
                loops differ, by the windows of softmax layers or by choosing keys anew (dsa): then all of them run.
            phases: values of sees_all (see LT2.forward) in the steps and validations to come.
        """
        start, n_before = time.perf_counter(), _n_graphs()
        are_alike = len(_windows(model)) == 1 and model.core.reuse_every == 1
        needed = [max(loops)] if are_alike else sorted(loops)
        for sees_all in phases:
            options = {"sees_all": sees_all, "with_auxiliary": True}
            for n_loops, n_backward_loops in needed:
                loss, auxiliary = model(**training, n_loops=n_loops, n_backward_loops=n_backward_loops, **options)
                sum(auxiliary.values(), loss).backward()
            if validation is not None:
                with torch.no_grad():
                    model(**validation, sees_all=sees_all)
        reshard(model)
        model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._n_graphs, self._since = _n_graphs(), time.time()
        self.n_warm_up_graphs, self.warm_up_seconds = self._n_graphs - n_before, time.perf_counter() - start
        logger.info(
            "torch.compile: %d graphs in %.1f s (with %s loops%s)",
            self.n_warm_up_graphs,
            self.warm_up_seconds,
            ", ".join(str(n) for n, _ in needed),
            "" if validation is None else " and a validation batch",
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the steps: refuse at once, where it is an error, and with every graph that did not fit.

        Raises:
            RecompileError: naming the function and, for each of its graphs, what does not fit.
        """
        with torch._dynamo.config.patch(error_on_recompile=self.is_error):
            try:
                yield
            except torch._dynamo.exc.RecompileError as error:
                raise self._refusal(str(error)) from error

    def check(self, step: int) -> None:
        """After a step or a validation: warn of what it compiled, or raise `RecompileError`.

        Compiler settings are those of a thread; `watching` does not see what autograd's threads compile.
        """
        n_new = _n_graphs() - self._n_graphs
        if not n_new:
            return
        self.n_recompiled += n_new
        reasons = [
            f"{metrics.compile_id} {metrics.co_name}: {metrics.recompile_reason or 'a function not compiled before'}"
            for metrics in get_compilation_metrics()
            if metrics.start_time is not None and metrics.start_time >= self._since and metrics.co_name
        ]
        self._n_graphs, self._since = _n_graphs(), time.time()
        text = f"step {step} compiled {n_new} graphs more: {'; '.join(reasons)}"
        if self.is_error:
            raise self._refusal(text)
        logger.warning("torch.compile: %s. %s", text, WAYS_OUT)

    def _refusal(self, text: str) -> RecompileError:
        return RecompileError(
            f"compile.error_on_recompile: {text}\n{WAYS_OUT}, or set it to false to go on with a pause"
        )


def _n_graphs() -> int:
    """Compiled in this process so far."""
    return int(counters["stats"]["unique_graphs"])
