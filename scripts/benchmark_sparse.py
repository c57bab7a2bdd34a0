"""What sparse attention costs as rows grow longer, beside full attention: time and memory of the blocks of a model.

python scripts/benchmark_sparse.py [--lengths 4096 32768] [--stacks full nsa dsa gdn+dsa] [--json FILE]

A stack is five layers of a recipe's width (the 1.3B model's by default), with one row of tokens, in bf16: forward,
forward and backward (blocks are computed again, as recipes train), and the decoding of one token after as many. Then
the time of DSA's operators alone, beside the least that the bytes they gather and their FLOPs would take.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lt2titan.config.loader import load_config
from lt2titan.kernels.backend import backend_versions, resolve_backend
from lt2titan.kernels.dsa import dsa_attention, dsa_indexer_kl, dsa_select
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import MixersConfig
from lt2titan.model.recompute import RecomputePlan
from lt2titan.model.state import allocate

RECIPES = Path(__file__).resolve().parents[1] / "train_configs"
MEMORY_BANDWIDTH, BF16_PEAK = 4.8e12, 989e12  # of an H200: bytes and dense FLOPs a second


@dataclass(kw_only=True)
class Arguments:
    """Compare attention over long rows on this device."""

    stacks: list[str] = field(default_factory=lambda: ["full", "nsa", "dsa", "gdn+dsa"])
    """Mixers; "a+b" has four layers of a and one of b, the others five of one kind."""
    lengths: list[int] = field(default_factory=lambda: [4096, 16384, 32768, 131072])
    """Tokens of the row."""
    recipe: str = "lt2_1.3b"
    """Whose widths and mixers' sizes, in train_configs/."""
    n_loops: int = 1
    """Passes over the stack."""
    repeats: int = 3
    """The median of so many is reported, after one that is not counted."""
    decode: int = 8
    """Tokens decoded one by one; 0 leaves decoding out."""
    no_operators: bool = False
    """Leave the operators alone out."""
    json: Path | None = None
    """Also write the results to this file, after every length."""


def configuration(stack: str, arguments: Arguments) -> ModelConfig:
    """Five layers of the recipe's width; a vocabulary that does not count."""
    recipe = load_config(RECIPES / f"{arguments.recipe}.toml", []).model
    common, _, rare = stack.partition("+")
    return replace(
        recipe,
        vocab_size=256,
        n_layers=5,
        n_loops=arguments.n_loops,
        mixer=common,
        hybrid=HybridConfig(mixer=rare),
    )


def timed(run: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float]:
    """Median milliseconds of ``run``, and the peak memory in GiB."""
    run()
    if device.type != "cuda":
        return _timed_on_host(run, repeats), float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2], torch.cuda.max_memory_allocated() / 2**30


def _timed_on_host(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def measure(stack: str, length: int, arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """One stack at one length."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_on_meta(configuration(stack, arguments), resolve_backend("auto", device))
    materialise(model, device, seed=0)
    model.to(dtype)
    model.core.recompute = RecomputePlan(blocks=True)
    tokens, last = torch.randint(0, 256, (1, length), device=device), torch.tensor([length - 1], device=device)
    result: dict[str, Any] = {"stack": stack, "length": length}

    def forward() -> None:
        with torch.no_grad():
            model(tokens, logits_at=last)

    def both() -> None:
        loss, auxiliary = model(tokens, targets=tokens, with_auxiliary=True)
        sum(auxiliary.values(), loss).backward()
        model.zero_grad()

    result["forward_ms"], result["forward_gib"] = timed(forward, arguments.repeats, device)
    result["forward_backward_ms"], result["forward_backward_gib"] = timed(both, arguments.repeats, device)
    if arguments.decode:
        result["decode_ms"], result["decode_gib"] = decode(model, length, arguments, dtype, device)
    return result


@torch.no_grad()
def decode(
    model: LT2, length: int, arguments: Arguments, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Milliseconds of a token after a context of ``length``. The state is filled with noise: what it holds does not
    change what a step costs."""
    state = allocate(model, 1, length + arguments.decode + 1, dtype, device)
    for slots in state.slots:
        for slot in slots:
            for name, tensor in slot.items():
                if name == "positions":
                    slots_held = torch.arange(tensor.shape[1], device=device)
                    tensor.copy_(slots_held.where(slots_held < length, -1))
                else:
                    tensor.normal_()
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    state.reserve([length])
    state.lengths += length
    return timed(lambda: model(token, state=state), arguments.decode - 1, device)


def operators(length: int, arguments: Arguments, device: torch.device) -> list[dict[str, Any]]:
    """DSA's operators alone at the recipe's sizes, one row, and their floors: the larger of bytes read and written
    (gathered keys: once for each query) over the memory's bandwidth, and FLOPs over the peak."""
    recipe = load_config(RECIPES / f"{arguments.recipe}.toml", []).model
    sizes, backend = recipe.mixers.dsa, resolve_backend("auto", device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    width, n_kv, J, E = recipe.dim // sizes.n_heads, sizes.n_kv_heads, sizes.n_index_heads, sizes.index_head_dim
    if length <= sizes.top_k:
        return []

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, length, *shape, device=device, dtype=dtype).requires_grad_()

    index = (draw(J, E), draw(E), draw(J))
    q, k, v = draw(sizes.n_heads, width), draw(n_kv, width), draw(n_kv, width)

    def select() -> Tensor:
        forced_first, forced_local = sizes.forced_first, sizes.forced_local
        return dsa_select(
            *index, top_k=sizes.top_k, forced_first=forced_first, forced_local=forced_local, backend=backend
        )

    with torch.no_grad():
        indices = select()
        o, lse = dsa_attention(q, k, v, indices, backend=backend)
    n_pairs, n_seen = float((indices >= 0).sum()), length * (length + 1) / 2
    of_key = 2 * n_kv * width * dtype.itemsize  # gathered for every pair, by all heads at once
    rows = length * sizes.n_heads * width * dtype.itemsize
    flops = 4 * n_pairs * sizes.n_heads * width
    weights = torch.randn_like(o)
    out, _ = dsa_attention(q, k, v, indices, backend=backend)
    jobs: dict[str, tuple[Callable[[], object], float, float]] = {
        # Scores are FLOPs; the keys that are chosen are written once.
        "select": (select, 4 * n_pairs, 2 * n_seen * J * E),
        "attention": (lambda: dsa_attention(q, k, v, indices, backend=backend), of_key * n_pairs + 2 * rows, flops),
        # Gradients of gathered keys are added in fp32.
        "attention backward": (
            lambda: torch.autograd.grad(out, (q, k, v), weights, retain_graph=True),
            (of_key + 2 * n_kv * width * 4) * n_pairs + 4 * rows,
            2.5 * flops,
        ),
        "indexer KL": (
            lambda: dsa_indexer_kl(*index, q, k, indices=indices, lse=lse, backend=backend),
            (of_key / 2 + 2 * E * dtype.itemsize + E * 4) * n_pairs,
            flops / 2 + 8 * n_pairs * J * E,
        ),
        "indexer KL, all keys": (
            lambda: dsa_indexer_kl(*index, q, k, backend=backend),
            2 * rows,
            4 * n_seen * sizes.n_heads * width + 8 * n_seen * J * E,
        ),
    }
    results = []
    for name, (run, n_bytes, n_flops) in jobs.items():
        if name == "indexer KL, all keys" and length > 32768:
            continue  # warm-up happens at shorter lengths
        ms, gib = timed(run, arguments.repeats, device)
        floor = 1000 * max(n_bytes / MEMORY_BANDWIDTH, n_flops / BF16_PEAK)
        results.append({"operator": name, "length": length, "ms": ms, "floor_ms": floor, "gib": gib})
    return results


def crossovers(results: list[dict[str, Any]]) -> list[str]:
    """From which length on each stack is faster than full attention, of those that were measured."""
    lines = []
    full = {row["length"]: row for row in results if row["stack"] == "full" and "raised" not in row}
    for stack in dict.fromkeys(row["stack"] for row in results):
        for key in ("forward_ms", "forward_backward_ms", "decode_ms"):
            rows = {row["length"]: row for row in results if row["stack"] == stack and key in row}
            shared = sorted(n for n in rows if key in full.get(n, {}))
            if stack == "full" or not shared:
                continue
            wins = [n for n in shared if rows[n][key] < full[n][key]]
            lines.append(
                f"{stack}, {key}: " + (f"faster than full from {wins[0]} tokens on" if wins else "never faster")
            )
    return lines


def show(results: list[dict[str, Any]], of_operators: list[dict[str, Any]]) -> None:
    keys = ["forward_ms", "forward_gib", "forward_backward_ms", "forward_backward_gib", "decode_ms", "decode_gib"]
    table = Table("stack", "tokens", *keys, box=box.SIMPLE_HEAD)
    for row in results:
        if "raised" in row:
            table.add_row(row["stack"], str(row["length"]), row["raised"])
        else:
            table.add_row(row["stack"], str(row["length"]), *(f"{row[key]:.2f}" if key in row else "-" for key in keys))
    Console(width=130).print(table)
    table = Table("operator", "tokens", "ms", "floor ms", "of the floor", "peak GiB", box=box.SIMPLE_HEAD)
    for row in of_operators:
        cells = (
            f"{row['ms']:.3f}",
            f"{row['floor_ms']:.3f}",
            f"{row['floor_ms'] / row['ms']:.0%}",
            f"{row['gib']:.2f}",
        )
        table.add_row(row["operator"], str(row["length"]), *cells)
    Console(width=130).print(table)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    unknown = {name for stack in arguments.stacks for name in stack.split("+")} - set(MixersConfig.names())
    if unknown:
        sys.exit(f"benchmark_sparse: --stacks {' '.join(sorted(unknown))}: there are {', '.join(MixersConfig.names())}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    results: list[dict[str, Any]] = []
    of_operators: list[dict[str, Any]] = []
    for length in arguments.lengths:
        for stack in arguments.stacks:
            try:
                results.append(measure(stack, length, arguments, device))
            except torch.OutOfMemoryError:
                results.append({"stack": stack, "length": length, "raised": "out of memory"})
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if not arguments.no_operators and any("dsa" in stack for stack in arguments.stacks):
            of_operators += operators(length, arguments, device)
        show([row for row in results if row["length"] == length], [r for r in of_operators if r["length"] == length])
        if arguments.json:
            report = {"device": hardware, "versions": backend_versions(), "stacks": results, "operators": of_operators}
            arguments.json.write_text(json.dumps(report, indent=1))
    print(f"{hardware}, {backend_versions()}, {arguments.n_loops} loops over 5 layers of {arguments.recipe}")
    show(results, of_operators)
    print("\n".join(crossovers(results)))


if __name__ == "__main__":
    main()
