"""The cases of scripts/benchmark_training.py: what each changes in the recipe.

One device: ``local_batch_size`` is a whole step. Batches are what an H200 (139 GiB) holds of the 1.3B recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BATCH_SIZES = {"none": 2}
"""Sequences per step, by checkpointing mode, where they are not 4, the recipe's."""

MODES = ("none", "selective", "block", "loop", "nested", "memory_budget")
COMPILED = ("compile.enable",)


@dataclass(frozen=True)
class Case:
    """A measured run.

    overrides: "key=value", or "key" for a switch; as on the command line of ./run_train.sh, without the dashes.
    n_steps: how many are measured; 0 leaves it to the command line.
    is_cold: compile as if for the first time. Kernels that are not torch.compile's stay tuned.
    is_profiled: the last step is traced.
    """

    overrides: tuple[str, ...]
    n_steps: int = 0
    is_cold: bool = False
    is_profiled: bool = False


def _mode(mode: str, batch_size: int = 0) -> tuple[str, ...]:
    n = batch_size or BATCH_SIZES.get(mode, 4)
    sizes = (f"training.local_batch_size={n}", f"training.global_batch_size={n}")
    return (f"activation_checkpoint.mode={mode}", *sizes)


def _modes() -> Iterator[tuple[str, Case]]:
    """Every checkpointing mode, eager and compiled."""
    for mode in MODES:
        if mode != "memory_budget":  # torch.compile's own
            yield f"modes/{mode}-eager", Case(_mode(mode))
        yield f"modes/{mode}-compiled", Case(_mode(mode) + COMPILED)
    # A compiled block keeps less: four sequences may fit without recomputation, or with it in some loops only.
    yield "modes/none-compiled-4", Case(_mode("none", 4) + COMPILED)
    for n in (1, 2, 3):
        skip = f"activation_checkpoint.skip_last_loops={n}"
        yield f"modes/block-but-{n}-compiled", Case((*_mode("block"), *COMPILED, skip))


def _float8() -> Iterator[tuple[str, Case]]:
    """In float8, compiled but for one; compare with modes/*-compiled."""
    for recipe in ("tensorwise", "rowwise"):
        for mode in MODES:
            yield f"float8/{mode}-{recipe}", Case((*_mode(mode), *COMPILED, f"float8.recipe={recipe}"))
    yield "float8/block-rowwise_with_gw_hp", Case((*_mode("block"), *COMPILED, "float8.recipe=rowwise_with_gw_hp"))
    # Shows what compiling saves: eager, each scale and cast is several kernels.
    eager = ("float8.recipe=tensorwise", "float8.allow_eager")
    yield "float8/block-tensorwise-eager", Case(_mode("block") + eager)
    each_visit = ("float8.recipe=tensorwise", "float8.all_gather=off")
    yield "float8/block-tensorwise-each-visit", Case(_mode("block") + COMPILED + each_visit)


def _loops() -> Iterator[tuple[str, Case]]:
    """Compile time and graphs, which must not depend on the number of loops."""
    for n in (1, 2, 4, 8):
        yield f"loops/{n}", Case((*_mode("block"), *COMPILED, f"model.n_loops={n}"), n_steps=2, is_cold=True)


def _schedule() -> Iterator[tuple[str, Case]]:
    """Four loops in every step against one to seven, drawn anew for each: the same mean. Alternate with --repeats."""
    common = (*_mode("block"), *COMPILED)
    # With this seed steps 4 to 10, those after three of warm-up, run every number of loops once.
    sampled = ("model.n_loops=7", "model.loop.schedule=uniform", "debug.seed=267")
    yield "schedule/fixed", Case((*common, "model.n_loops=4"), n_steps=7)
    yield "schedule/sampled", Case(common + sampled, n_steps=7)


def _profile() -> Iterator[tuple[str, Case]]:
    """Where the time of a step goes."""
    yield "profile/block-eager", Case(_mode("block"), n_steps=8, is_profiled=True)
    yield "profile/block-compiled", Case(_mode("block") + COMPILED, n_steps=8, is_profiled=True)
    # Beside each other: weights in float8 that are cast once, and those that a compiled block casts for itself.
    tensorwise = (*_mode("block"), *COMPILED, "float8.recipe=tensorwise")
    yield "profile/block-tensorwise", Case(tensorwise, n_steps=10, is_profiled=True)
    each_visit = (*tensorwise, "float8.all_gather=off")
    yield "profile/block-tensorwise-each-visit", Case(each_visit, n_steps=10, is_profiled=True)
    fastest = (*_mode("selective"), *COMPILED, "float8.recipe=tensorwise")
    yield "profile/selective-tensorwise", Case(fastest, n_steps=8, is_profiled=True)


CASES: dict[str, Case] = dict([*_modes(), *_float8(), *_loops(), *_schedule(), *_profile()])
"""By name: suite/case."""
