"""What one layer of each attention mixer costs by length: forward, backward and decoding, time and memory.

python scripts/benchmark_layers.py [--mixers full nsa] [--lengths 4096 16384] [--json FILE]

Mixers have the sizes of their recipe (train_configs/ablations/pure_<mixer>_<scale>.toml), projections included, in bf16
at random initialisation, one sequence. With --kernels, where the GPU's time goes. Needs a GPU.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lt2titan.config.loader import load_config
from lt2titan.kernels.backend import backend_versions, resolve_backend
from lt2titan.kernels.nsa.layout import block_layout
from lt2titan.model.config import ModelConfig
from lt2titan.model.context import Context, rotary_tables
from lt2titan.model.mixers.base import Mixer, State
from lt2titan.model.mixers.registry import build_mixer

RECIPES = Path(__file__).resolve().parents[1] / "train_configs" / "ablations"
DTYPE = torch.bfloat16
GIB = 2**30


@dataclass(kw_only=True)
class Arguments:
    """Compare attention layers by length on this GPU."""

    mixers: list[str] = field(default_factory=lambda: ["full", "nsa"])
    """Only these."""
    lengths: list[int] = field(default_factory=lambda: [4096, 16384, 32768, 131072])
    """Tokens of the sequence."""
    scale: str = "1.3b"
    """Recipes pure_<mixer>_<scale>.toml."""
    repeats: int = 5
    """Measurements, of which the median counts."""
    kernels: bool = False
    """Also print the longest kernels of a forward and backward pass."""
    json: Path | None = None
    """Also write the results to this file."""


def build(config: ModelConfig, device: torch.device) -> Mixer:
    mixer = build_mixer(config.mixer, config, True, resolve_backend("auto", device)).to(device, DTYPE)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=config.dim**-0.5, generator=generator)
    return mixer


def context_of(mixer: Mixer, config: ModelConfig, start: int, length: int, device: torch.device) -> Context:
    positions = torch.arange(start, start + length, device=device)[None]
    width, size = mixer.rotary_dim, mixer.key_block_size
    return Context(
        positions,
        {width: rotary_tables(positions, width, config.rope_theta)} if width else {},
        max_seqlen=length,
        key_blocks={size: block_layout(1, length, size, None, device)} if size else {},
    )


def milliseconds(call: Callable[[], Any], n_repeats: int) -> float:
    """Median time on the GPU, after one call for compiling."""
    call()
    times = []
    for _ in range(n_repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def train(mixer: Mixer, config: ModelConfig, length: int, device: torch.device, n_repeats: int) -> dict[str, float]:
    """Forward and backward; the peak is beside what was there before (weights and input)."""
    context = context_of(mixer, config, 0, length, device)
    x = torch.randn(1, length, config.dim, device=device, dtype=DTYPE, requires_grad=True)
    dy = torch.randn_like(x)
    inputs = [x, *mixer.parameters()]

    def forward() -> Tensor:
        return mixer(x, context, mixer.initial_carry(x, context))[0]

    def both() -> None:
        torch.autograd.grad(forward(), inputs, dy)

    both()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    forward_ms, both_ms = milliseconds(forward, n_repeats), milliseconds(both, n_repeats)
    return {"forward_ms": forward_ms, "backward_ms": both_ms - forward_ms, "peak_gib": peak / GIB}


@torch.no_grad()
def decode(mixer: Mixer, config: ModelConfig, length: int, device: torch.device, n_repeats: int) -> dict[str, float]:
    """One more token after ``length`` - 1 of them, launched by the host and as a CUDA graph."""
    state: State = {}
    for name, spec in mixer.state_spec(1, length, None).items():
        state[name] = torch.randn(spec.shape, device=device).to(spec.dtype or DTYPE)
        if not state[name].is_floating_point():  # the positions that slots hold
            state[name].copy_(torch.arange(spec.shape[1], device=device))
    context = context_of(mixer, config, length - 1, 1, device)
    x = torch.randn(1, 1, config.dim, device=device, dtype=DTYPE)

    def step() -> None:
        mixer(x, context, mixer.initial_carry(x, context), state)

    eager = milliseconds(step, 4 * n_repeats)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    n_bytes = sum(t.numel() * t.element_size() for t in state.values())
    return {
        "decode_ms": milliseconds(graph.replay, 4 * n_repeats),
        "decode_eager_ms": eager,
        "state_mib": n_bytes / 2**20,
    }


def longest_kernels(mixer: Mixer, config: ModelConfig, length: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each kernel in one forward and backward pass, the longest ten."""
    context = context_of(mixer, config, 0, length, device)
    x = torch.randn(1, length, config.dim, device=device, dtype=DTYPE, requires_grad=True)
    mixer(x, context, mixer.initial_carry(x, context))[0].sum().backward()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        mixer(x, context, mixer.initial_carry(x, context))[0].sum().backward()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key[:70]: event.self_device_time_total / 1e3 for event in events[:14]}


def show(results: list[dict[str, Any]]) -> None:
    columns = [key for key in results[0] if key != "kernels"]
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for row in results:
        table.add_row(*(f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    Console(width=140).print(table)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if not torch.cuda.is_available():
        sys.exit("benchmark_layers: needs a GPU")
    device, results = torch.device("cuda"), []
    for name in arguments.mixers:
        config = load_config(RECIPES / f"pure_{name}_{arguments.scale}.toml", []).model
        for length in arguments.lengths:
            mixer = build(config, device)
            result: dict[str, Any] = {"mixer": name, "length": length}
            result |= train(mixer, config, length, device, arguments.repeats)
            result |= decode(mixer, config, length, device, arguments.repeats)
            if arguments.kernels:
                result["kernels"] = longest_kernels(mixer, config, length, device)
                print(*(f"{ms:9.3f} ms  {kernel}" for kernel, ms in result["kernels"].items()), sep="\n")
            results.append(result)
            show(results[-1:])
            del mixer
            gc.collect()
            torch.cuda.empty_cache()
            if arguments.json:
                report = {"device": torch.cuda.get_device_name(), "versions": backend_versions(), "results": results}
                arguments.json.write_text(json.dumps(report, indent=1))
    print(f"{torch.cuda.get_device_name()}, {backend_versions()}")
    show(results)


if __name__ == "__main__":
    main()
