"""What a configuration will cost: parameters, FLOPs per token and decode state. Needs no GPU and no data.

python scripts/estimate.py --config train_configs/lt2_1.3b.toml [--json] [--model.n_loops 2 ...]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lt2titan.config.job import JobConfig
from lt2titan.config.loader import load_config_or_exit
from lt2titan.model.flops import count_parameters, scheduled_flops_per_token
from lt2titan.model.init import build_on_meta
from lt2titan.model.loop_schedule import LoopSchedule
from lt2titan.model.state import allocate


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
    per_token = state_bytes(long + 1) - state_bytes(long)
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
    table.add_row("  per token", f"{state['per_token']:,}", "keys and values of full attention")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="TOML file, e.g. train_configs/lt2_1.3b.toml")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments, overrides = parser.parse_known_args()
    result = estimate(load_config_or_exit(arguments.config, overrides))
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
