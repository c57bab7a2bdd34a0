"""What a configuration will cost: parameters, FLOPs, decode state, memory, communication. Needs no GPU and no data.

python scripts/estimate.py --config train_configs/lt2_1.3b.toml [--world-size 24] [--json] [--model.n_loops 2 ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lt2titan.config.job import JobConfig
from lt2titan.config.loader import load_config_or_exit
from lt2titan.config.section import ConfigError
from lt2titan.layout_plan import convert_to_float8, core_of, estimate_communication, estimate_memory, plan_layout
from lt2titan.model.flops import count_parameters, scheduled_flops_per_token
from lt2titan.model.init import build_on_meta
from lt2titan.model.loop_schedule import LoopSchedule
from lt2titan.model.lt2 import LT2
from lt2titan.model.state import allocate
from lt2titan.parallel.activation_memory import CoreMemory
from lt2titan.parallel.fake_blocks import first_share
from lt2titan.parallel.layout import Layout


def estimate(config: JobConfig) -> dict[str, Any]:
    """Counts from the model built on ``meta``; the decode state is that of one sequence, activations in bf16."""
    model = build_on_meta(config.model, "reference")
    parameters, seq_len = count_parameters(model), config.training.seq_len
    loops = LoopSchedule(config.model.loop, config.model.n_loops, config.debug.seed)
    _, n_steps = config.schedule
    flops = scheduled_flops_per_token(model, seq_len, loops, n_steps)

    def state_bytes(length: int) -> int:
        return allocate(model, 1, length, torch.bfloat16, "meta").n_bytes

    long = 1 << 20  # beyond every window
    per_token = round((state_bytes(2 * long) - state_bytes(long)) / long)  # of many tokens: some mixers keep blocks
    return {
        "parameters": {
            "total": parameters.total,
            "embedding": parameters.embedding,
            "core": parameters.core,
            "head": parameters.head,
            "blocks": {
                name: parameters.blocks[config.model.layer_mixers.index(name)]
                for name in dict.fromkeys(config.model.layer_mixers)
            },
        },
        "mean_loops": loops.mean(n_steps),
        "training_flops_per_token": flops.model,
        "recurrence_flops_per_token": flops.recurrence,
        "seq_len": seq_len,
        "decode_state_bytes": {
            "at_seq_len": state_bytes(seq_len),
            "constant": state_bytes(long) - per_token * long,
            "per_token": per_token,
        },
    }


def estimate_layout(config: JobConfig, world_size: int, device_memory: int = 0) -> dict[str, Any]:
    """Memory per device by category, and communication of a step with the most loops, on ``world_size`` GPUs of
    ``device_memory`` bytes (0: as comm.device_memory_gib says). Attention is taken to gather keys
    (parallelism.context_parallel_attention = "ring" takes less)."""
    config.validate_layout(world_size)
    model = build_on_meta(config.model, "reference" if config.kernels.backend == "reference" else "fla")
    precision, is_compiled = config.training.mixed_precision_param, config.compile.enable
    dtype = torch.bfloat16 if precision == "auto" else getattr(torch, precision)
    reduce_dtype = getattr(torch, config.training.mixed_precision_reduce)
    convert_to_float8(config, model, world_size)
    device_memory = device_memory or int(config.comm.device_memory_gib * 2**30)
    layout = plan_layout(config, model, world_size, dtype, device_memory)
    share = first_share(model, layout)
    core = core_of(config, share, layout, dtype, is_compiled)
    memory = estimate_memory(config, share, layout, core, dtype, is_compiled)
    return {
        "activation_modes": of_modes(config, share, layout, dtype, core),
        "world_size": world_size,
        "layout": layout._asdict(),
        "memory_bytes": memory,
        "communication_loops": config.model.n_loops,
        "communication": {
            name: {"count": sent.n_times, "bytes_sent": sent.n_bytes}
            for name, sent in estimate_communication(config, share, layout, dtype, reduce_dtype).items()
        },
    }


def of_modes(
    config: JobConfig, model: LT2, layout: Layout, dtype: torch.dtype, core: CoreMemory
) -> dict[str, dict[str, int]]:
    """Bytes that depend on activation_checkpoint.mode. ``core`` is the configured mode's, and all are sums of it, but
    for memory_budget, whose blocks are others; it is left out where blocks are not compiled."""
    names, is_compiled = ("activations kept", "activations in backward", "peak"), config.compile.enable
    cores = {config.activation_checkpoint.mode == "memory_budget": core}
    found: dict[str, dict[str, int]] = {}
    for mode in ("none", "selective", "memory_budget", "block", "loop", "nested"):
        if mode == "memory_budget" and not is_compiled:
            continue
        other = replace(config, activation_checkpoint=replace(config.activation_checkpoint, mode=mode))
        is_budgeted = mode == "memory_budget"
        if is_budgeted not in cores:
            cores[is_budgeted] = core_of(other, model, layout, dtype, is_compiled)
        sizes = estimate_memory(other, model, layout, cores[is_budgeted], dtype, is_compiled)
        found[mode] = {name: sizes[name] for name in names}
    return found


def show_layout(result: dict[str, Any]) -> None:
    title = ", ".join(f"{key} {value}" for key, value in result["layout"].items())
    table = Table("per device", "value", title=f"{result['world_size']} GPUs: {title}")
    for name, size in result["memory_bytes"].items():
        table.add_row(name, f"{size / 2**30:.2f} GiB")
    for name, row in result["communication"].items():
        table.add_row(
            f"{name}, per step of {result['communication_loops']} loops",
            f"{row['count']:,}, {row['bytes_sent'] / 2**30:.2f} GiB sent",
        )
    console = Console()
    console.print(table)
    title = "by activation_checkpoint.mode, this layout"
    if "memory_budget" not in result["activation_modes"]:
        title += " (memory_budget needs compile.enable)"
    modes = Table("mode", *next(iter(result["activation_modes"].values())), title=title)
    for mode, sizes in result["activation_modes"].items():
        modes.add_row(mode, *(f"{size / 2**30:.2f} GiB" for size in sizes.values()))
    console.print(modes)


def show(result: dict[str, Any]) -> None:
    table = Table("quantity", "value", "meaning")
    meanings = {
        "total": "tied weights counted once",
        "embedding": "also the head's weight when tied",
        "core": "the looped blocks and rho, counted once",
        "head": "0 when tied",
    }
    for name, meaning in meanings.items():
        table.add_row(f"parameters, {name}", f"{result['parameters'][name]:,}", meaning)
    for name, count in result["parameters"]["blocks"].items():
        table.add_row(f"parameters, {name} block", f"{count:,}", "one layer")
    seq_len = f"sequences of {result['seq_len']:,}"
    flops = result["training_flops_per_token"]
    table.add_row("loops per training step", f"{result['mean_loops']:.4g}", "mean of model.loop.schedule")
    table.add_row("training FLOPs per token", f"{flops:.4g}", f"forward and backward, as executed; {seq_len}")
    table.add_row("  linear recurrences", f"{result['recurrence_flops_per_token']:.4g}", "apart, not part of MFU")
    state = result["decode_state_bytes"]
    table.add_row("decode state, bytes", f"{state['at_seq_len']:,}", f"one of the {seq_len}, bf16")
    table.add_row("  constant", f"{state['constant']:,}", "whatever the length, once windows are full")
    table.add_row("  per token", f"{state['per_token']:,}", "keys and values of full and sparse attention")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="TOML file, e.g. train_configs/lt2_1.3b.toml")
    parser.add_argument("--world-size", type=int, default=0, help="GPUs: adds memory per device and communication")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments, overrides = parser.parse_known_args()
    if arguments.world_size < 0:
        parser.error(f"--world-size {arguments.world_size}: must be positive, or 0 to leave the layout out")
    config = load_config_or_exit(arguments.config, overrides)
    result = estimate(config)
    try:
        layout = estimate_layout(config, arguments.world_size) if arguments.world_size else {}
    except ConfigError as error:  # degrees or batch that do not fit so many GPUs
        sys.exit(f"estimate: {error}")
    if arguments.json:
        print(json.dumps(result | layout))
        return
    show(result)
    if layout:
        show_layout(layout)


if __name__ == "__main__":
    main()
