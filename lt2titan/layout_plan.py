"""How a configuration lies over devices; what is "auto" of it is chosen by the memory that a step should need."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from lt2titan.config.job import JobConfig
from lt2titan.model.lt2 import LT2
from lt2titan.out_of_memory import ADVICE
from lt2titan.parallel.activation_checkpoint import recompute_plan
from lt2titan.parallel.activation_memory import CoreMemory, core_memory
from lt2titan.parallel.communication_estimate import Sent, of_activations, of_ends, of_parameters, together
from lt2titan.parallel.fake_blocks import first_share
from lt2titan.parallel.float8 import apply_float8, plan_float8
from lt2titan.parallel.layout import Layout
from lt2titan.parallel.layout_estimate import memory_by_category
from lt2titan.parallel.visit_collectives import visit_collectives

logger = logging.getLogger("lt2titan")

USABLE = 0.9
"""Of a device's memory: the estimate leaves out temporary tensors inside operators and what the allocator wastes, and
measured peaks are up to a tenth off (docs/benchmarks.md)."""


def convert_to_float8(config: JobConfig, model: LT2, world_size: int, device: torch.device | None = None) -> None:
    """Apply ``[float8]``, if it asks for anything, to ``model``, on ``meta``, in place. Comes first: what a layout
    needs is measured of the blocks that will be trained.

    Args:
        device: that must be able to run it; None for an estimate, which asks for none.

    Raises:
        ConfigError: see `plan_float8` and `apply_float8`.
    """
    parallelism, training = config.parallelism, config.training
    batch_size, _ = training.microbatches(parallelism.data_parallel_size(world_size))
    plan = plan_float8(
        config.float8,
        device=device,
        compiled=config.compile.enable,
        n_tokens=batch_size * training.seq_len // parallelism.context_parallel_degree,
    )
    if plan is not None:
        apply_float8(model, plan, parallelism.tensor_parallel_degree)


def plan_layout(config: JobConfig, model: LT2, world_size: int, dtype: torch.dtype, device_memory: int) -> Layout:
    """Degrees as configured; how long blocks stay gathered and when gradients are reduced, as configured or chosen.

    Chosen is what communicates least of what fits: all-gathers once per step before once per pass before once per
    visit, then reductions once per step. Compiled blocks keep less than eager ones, which are measured at once: the
    compiler is asked, for some seconds, where that could change the choice.

    Args:
        model: unsharded, ``meta`` will do; in float8 already, if it will be trained so (`convert_to_float8`).
        dtype: of compute.
        device_memory: bytes.
    """
    parallelism = config.parallelism
    n_context, n_replicas = parallelism.context_parallel_degree, parallelism.data_parallel_replicate_degree
    layout = Layout(
        n_replicas=n_replicas,
        n_shards=parallelism.shard_degree(world_size) * n_context,
        n_context=n_context,
        n_tensor=parallelism.tensor_parallel_degree,
        sequence_parallel=parallelism.sequence_parallel,
        cpu_offload=parallelism.cpu_offload,
    )
    _, n_microbatches = _microbatches(config, layout)
    can_defer = n_microbatches > 1 and layout.n_shards * n_replicas > 1

    share = first_share(model, layout)
    usable = USABLE * device_memory
    policies = {"loop_reshard": parallelism.fsdp_loop_reshard, "defer_reductions": parallelism.fsdp_defer_reductions}

    def chosen(is_compiled: bool) -> tuple[Layout, dict[str, int], bool]:
        """The layout, its memory, and whether it is what it would be if there were any amount, and fits."""
        core = core_of(config, share, layout, dtype, is_compiled)

        def sizes(layout: Layout) -> dict[str, int]:
            return estimate_memory(config, share, layout, core, dtype, is_compiled)

        def peak(layout: Layout) -> int:
            return sizes(layout)["peak"]

        best = choose(layout, peak, usable=usable, can_defer=can_defer, **policies)
        wanted = choose(layout, peak, usable=float("inf"), can_defer=can_defer, **policies)
        return best, sizes(best), best == wanted and peak(best) <= usable

    is_compiled = False
    planned, sizes, is_settled = chosen(is_compiled)
    if config.compile.enable and not is_settled:
        is_compiled = True
        planned, sizes, _ = chosen(is_compiled)
    logger.info(
        "fsdp_loop_reshard = %s (%s), reductions %s (%s)",
        planned.loop_reshard,
        "auto" if parallelism.fsdp_loop_reshard == "auto" else "as configured",
        "deferred to the last microbatch"
        if planned.defers_reductions
        else "after every microbatch"
        if can_defer
        else "nothing to defer",
        parallelism.fsdp_defer_reductions,
    )
    _report(sizes, is_compiled, device_memory)
    return planned


def choose(
    layout: Layout,
    peak: Callable[[Layout], int],
    *,
    usable: float,
    loop_reshard: str,
    defer_reductions: str,
    can_defer: bool,
) -> Layout:
    """``layout`` with what is "auto" of the two policies chosen so that its ``peak`` is at most ``usable``, if any is.

    Args:
        loop_reshard: "auto", "per_step", "per_pass" or "per_visit".
        defer_reductions: "auto", "on" or "off".
        can_defer: there are several microbatches, and ranks to reduce over.
    """
    layout = layout._replace(defers_reductions=can_defer and defer_reductions == "on")
    policies = ["per_step", "per_pass", "per_visit"] if loop_reshard == "auto" else [loop_reshard]
    layouts = [layout._replace(loop_reshard=policy) for policy in policies]
    layout = next((layout for layout in layouts if peak(layout) <= usable), layouts[-1])
    deferred = layout._replace(defers_reductions=True)
    return deferred if can_defer and defer_reductions == "auto" and peak(deferred) <= usable else layout


def core_of(config: JobConfig, model: LT2, layout: Layout, dtype: torch.dtype, is_compiled: bool = False) -> CoreMemory:
    """What the blocks of ``model``, a tensor-parallel rank's share (`first_share`), keep of a microbatch."""
    recompute = config.activation_checkpoint
    return core_memory(
        model,
        **_rows(config, layout),
        dtype=dtype,
        n_context=layout.n_context,
        n_token_shares=layout.n_token_shares,
        is_compiled=is_compiled,
        memory_budget=recompute.memory_budget if recompute.mode == "memory_budget" else 1.0,
    )


def _rows(config: JobConfig, layout: Layout) -> dict[str, int]:
    """Of a microbatch, as a rank has them."""
    batch_size, _ = _microbatches(config, layout)
    return {
        "batch_size": batch_size,
        "length": config.training.seq_len // layout.n_context,
        "n_documents": batch_size * config.data.max_documents_per_sample if config.data.document_mask else 0,
    }


def estimate_communication(
    config: JobConfig, model: LT2, layout: Layout, dtype: torch.dtype, reduce_dtype: torch.dtype
) -> dict[str, Sent]:
    """What a device sends in an optimizer step, by collective and by the ranks that take part. Attention over context
    ranks is taken to gather keys.

    Args:
        model: as for `core_of`.
        dtype, reduce_dtype: of compute and of the reduction of gradients.
    """
    _, n_microbatches = _microbatches(config, layout)
    n_loops, n_backward_loops = config.model.n_loops, config.model.loop.backward_loops
    of_fsdp = of_parameters(
        model,
        layout,
        n_microbatches=n_microbatches,
        n_loops=n_loops,
        n_backward_loops=n_backward_loops,
        dtype=dtype,
        reduce_dtype=reduce_dtype,
    )
    if layout.n_tensor == layout.n_context == 1:
        return of_fsdp
    rows = _rows(config, layout)
    plan = recompute_plan(config.activation_checkpoint.mode, config.activation_checkpoint.skip_last_loops)
    visits = visit_collectives(
        model,
        plan,
        **rows,
        dtype=dtype,
        n_context=layout.n_context,
        n_tensor=layout.n_tensor,
        n_token_shares=layout.n_token_shares,
        is_compiled=config.compile.enable,
    )
    of_core = of_activations(
        visits,
        plan,
        n_microbatches=n_microbatches,
        n_loops=n_loops,
        n_backward_loops=n_backward_loops,
        has_gate=config.model.loop.residual_gate,
    )
    of_rest = of_ends(
        model,
        layout,
        n_tokens=rows["batch_size"] * rows["length"],
        dtype=dtype,
        n_microbatches=n_microbatches,
        is_truncated=0 < n_backward_loops < n_loops,
    )
    return together(of_fsdp, of_core, of_rest)


def estimate_memory(
    config: JobConfig, model: LT2, layout: Layout, core: CoreMemory, dtype: torch.dtype, is_compiled: bool = False
) -> dict[str, int]:
    """Bytes per device by category; see `memory_by_category`. ``model`` is as for `core_of`."""
    batch_size, n_microbatches = _microbatches(config, layout)
    return memory_by_category(
        model,
        layout,
        core,
        n_tokens=batch_size * config.training.seq_len // layout.n_context,
        dtype=dtype,
        activation_checkpoint=config.activation_checkpoint.mode,
        skip_last_loops=config.activation_checkpoint.skip_last_loops,
        n_loops=config.model.n_loops,
        n_backward_loops=config.model.loop.backward_loops,
        is_compiled=is_compiled,
        n_microbatches=n_microbatches,
    )


def _report(sizes: dict[str, int], is_compiled: bool, device_memory: int) -> None:
    """Log what a step should need, and warn if that hardly fits."""
    resident = ("weights", "gradients", "optimizer state", "gathered parameters", "whole gradients", "activations kept")
    logger.info(
        "memory per device, estimated of %s blocks: %s; peak %s of %s",
        "compiled" if is_compiled else "eager",
        ", ".join(f"{name} {_gib(sizes[name])}" for name in resident),
        _gib(sizes["peak"]),
        _gib(device_memory),
    )
    if sizes["peak"] > USABLE * device_memory:
        logger.warning(
            "a step is estimated to need %s, and the device has %s, of which temporary tensors take some: if it runs "
            "out of memory, %s",
            _gib(sizes["peak"]),
            _gib(device_memory),
            ADVICE,
        )


def _microbatches(config: JobConfig, layout: Layout) -> tuple[int, int]:
    """Rows of a microbatch, and microbatches of a step."""
    return config.training.microbatches(layout.n_replicas * layout.n_shards // layout.n_context)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
