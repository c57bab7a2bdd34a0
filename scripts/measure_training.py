"""One training run, measured: throughput, memory beside its estimate, compilation. One device, random tokens.

python scripts/measure_training.py --config train_configs/lt2_1.3b.toml [--steps 8] [--section.key value ...]

The Trainer itself runs and times the steps: the device is waited for after each, data and logging are part of it.
Prints one JSON object. scripts/benchmark_training.py runs many of these, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmark_mixers import join_a_group_of_one
from estimate import estimate_layout
from measured_recipe import PROFILED_STEPS, measured_recipe
from torch._dynamo.utils import get_compilation_metrics

from lt2titan.config.job import JobConfig
from lt2titan.kernels.backend import backend_versions
from lt2titan.metrics.hardware import device_memory
from lt2titan.metrics.logging import init_logging
from lt2titan.metrics.metrics_logger import METRICS_FILE
from lt2titan.metrics.trace_summary import read_trace, summarize
from lt2titan.parallel.distributed import process_group
from lt2titan.trainer import Trainer


def measure(
    config: JobConfig, n_warm_up: int, predicted_bytes: int, device: torch.device, n_compiled_before: int
) -> dict[str, Any]:
    """Train, and read what the run recorded. Medians are over the steps after ``n_warm_up``, tflops is their work over
    their time; both leave out what a profiler slows down."""
    with Trainer(config, device) as trainer:
        trainer.train()
    folder = Path(config.job.dump_folder)
    records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    is_profiled = config.profiling.enable_profiling
    steps = records[n_warm_up : -PROFILED_STEPS if is_profiled else None]
    n_tokens = trainer.tokens_seen / len(records)
    seconds = [n_tokens / record["tokens_per_second"] for record in steps]
    work = sum(record["tflops"] * time for record, time in zip(steps, seconds, strict=True))
    return {
        "tokens_per_step": int(n_tokens),
        "tokens_per_second": n_tokens / median(seconds),
        "mean_tokens_per_second": n_tokens * len(steps) / sum(seconds),
        "ms": 1e3 * median(seconds),
        "mfu": median(record["mfu"] for record in steps) if steps[0]["mfu"] is not None else None,
        "tflops": work / sum(seconds),
        "loops": [record["loops"] for record in steps],
        "step_ms": [round(1e3 * time, 2) for time in seconds],
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
        "skipped_steps": records[-1]["skipped_steps"],
        **_memory(records, n_warm_up, predicted_bytes, device),
        "compilation": _compilation(trainer, n_compiled_before),
        "profile": _profile(folder) if is_profiled else None,
    }


def _memory(
    records: list[dict[str, Any]], n_warm_up: int, predicted_bytes: int, device: torch.device
) -> dict[str, Any]:
    """Peak GiB of a step, without what the warm-up took (compiling and tuning kernels need room of their own), beside
    its estimate. A CPU's is the whole process's, which nothing estimates."""
    predicted = predicted_bytes / 2**30
    peak = max(record["memory_gib"] for record in records[n_warm_up:])
    return {
        "peak_memory_gib": peak,
        "warm_up_peak_memory_gib": max(record["memory_gib"] for record in records),
        "predicted_memory_gib": predicted,
        "predicted_over_measured": predicted / peak if device.type == "cuda" else None,
    }


def _compilation(trainer: Trainer, n_before: int) -> dict[str, Any] | None:
    """seconds: in the compiler; warm_up_seconds: until everything was compiled and had run once, kernels tuned."""
    watch = trainer.recompiles
    if watch is None:
        return None
    events = [event for event in get_compilation_metrics()[n_before:] if not event.is_runtime]
    return {
        "graphs": watch.n_warm_up_graphs,
        "seconds": sum(event.duration_us or 0 for event in events) / 1e6,
        "warm_up_seconds": watch.warm_up_seconds,
        "recompiled": watch.n_recompiled,
    }


def _profile(folder: Path) -> dict[str, Any]:
    (trace,) = folder.glob("profile_traces/*/rank0_trace.json.gz")
    return summarize(read_trace(trace)).as_dict(top=25) | {"text": (trace.parent / "rank0_summary.txt").read_text()}


def versions() -> dict[str, str]:
    """Of the kernels' packages and of torchao."""
    try:
        return backend_versions() | {"torchao": metadata.version("torchao")}
    except metadata.PackageNotFoundError:
        return backend_versions() | {"torchao": "missing"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="TOML file, e.g. train_configs/lt2_1.3b.toml")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before those that are measured")
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured")
    parser.add_argument("--profile", action="store_true", help="trace the last step and summarise the trace")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments, overrides = parser.parse_known_args()
    n_needed = 1 + (PROFILED_STEPS if arguments.profile else 0)
    if arguments.steps < n_needed or arguments.warm_up < 1:
        parser.error(f"--warm-up must be at least 1, and --steps at least {n_needed} here")
    init_logging()
    _store = join_a_group_of_one()
    with tempfile.TemporaryDirectory() as folder:
        config = measured_recipe(
            arguments.config,
            overrides,
            n_warm_up=arguments.warm_up,
            n_steps=arguments.steps,
            is_profiled=arguments.profile,
            folder=folder,
        )
        with process_group() as device:
            predicted = estimate_layout(config, 1, device_memory(device))["memory_bytes"]["peak"]
            n_before = len(get_compilation_metrics())  # the estimate of compiled blocks compiles a little too
            name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
            result = {
                "device": name,
                "versions": versions(),
                **measure(config, arguments.warm_up, predicted, device, n_before),
            }
    text = json.dumps(result)
    if arguments.json:
        arguments.json.write_text(text)
    print(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
