"""What sparse attention costs as rows grow longer, beside full attention: time and memory of the blocks of a model.

python scripts/benchmark_sparse.py [--lengths 4096 32768] [--stacks full nsa dsa gdn+dsa] [--json FILE]

A stack is five layers of a recipe's width (the 1.3B model's by default), with one row of tokens, in bf16: forward,
forward and backward (blocks are computed again, as recipes train), and the decoding of one token after as many. Then
the time of the sparse operators alone (scripts/sparse_operators.py), beside the least that the bytes they gather and
their FLOPs would take.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from sparse_operators import dsa_operators, nsa_operators, timed

from lt2titan.config.loader import load_config
from lt2titan.kernels.backend import backend_versions, resolve_backend
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import MixersConfig
from lt2titan.model.recompute import RecomputePlan
from lt2titan.model.state import allocate

RECIPES = Path(__file__).resolve().parents[1] / "train_configs"
FIGURES = ("forward", "forward_backward", "decode", "decode_graph")
"""Of each: "_ms" and "_gib"."""


@dataclass(kw_only=True)
class Arguments:
    """Compare attention over long rows on this device."""

    stacks: list[str] = field(default_factory=lambda: ["full", "nsa", "dsa", "gdn+dsa"])
    """Mixers; "a+b" has four layers of a and one of b, the others five of one kind."""
    lengths: list[int] = field(default_factory=lambda: [4096, 16384, 32768, 131072])
    """Tokens of the row."""
    recipe: str = "lt2_1.3b"
    """Whose widths and mixers' sizes."""
    recipes: Path = RECIPES
    """Folder of recipes."""
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
    recipe = load_config(arguments.recipes / f"{arguments.recipe}.toml", []).model
    common, _, rare = stack.partition("+")
    return replace(
        recipe,
        vocab_size=256,
        n_layers=5,
        n_loops=arguments.n_loops,
        mixer=common,
        hybrid=HybridConfig(mixer=rare),
    )


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
        result |= decode(model, length, arguments, dtype, device)
    return result


@torch.no_grad()
def decode(model: LT2, length: int, arguments: Arguments, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """A token after a context of ``length``, op by op and, on a GPU, replayed as a CUDA graph, which does not wait for
    the host. The state is filled with noise: what it holds does not change what a step costs."""
    n_tokens = 2 * arguments.decode + 2  # both ways, and a first call of each
    state = allocate(model, 1, length + n_tokens, dtype, device)
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
    result = {}
    result["decode_ms"], result["decode_gib"] = timed(lambda: model(token, state=state), arguments.decode, device)
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(token, state=state)
        result["decode_graph_ms"], result["decode_graph_gib"] = timed(graph.replay, arguments.decode, device)
    return result


def crossovers(results: list[dict[str, Any]]) -> list[str]:
    """From which length on each stack is faster than full attention, of those that were measured."""
    lines = []
    full = {row["length"]: row for row in results if row["stack"] == "full" and "raised" not in row}
    for stack in dict.fromkeys(row["stack"] for row in results):
        for key in (f"{name}_ms" for name in FIGURES):
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
    keys = [f"{name}_{unit}" for name in FIGURES for unit in ("ms", "gib")]
    table = Table("stack", "tokens", *(key.replace("_", " ") for key in keys), box=box.SIMPLE_HEAD)
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
        recipe = load_config(arguments.recipes / f"{arguments.recipe}.toml", []).model
        for mixer, operators in {"nsa": nsa_operators, "dsa": dsa_operators}.items():
            if not arguments.no_operators and any(mixer in stack.split("+") for stack in arguments.stacks):
                of_operators += operators(recipe, length, arguments.repeats, device)
        show([row for row in results if row["length"] == length], [r for r in of_operators if r["length"] == length])
        if arguments.json:
            report = {"device": hardware, "versions": backend_versions(), "stacks": results, "operators": of_operators}
            arguments.json.write_text(json.dumps(report, indent=1))
    print(f"{hardware}, {backend_versions()}, {arguments.n_loops} loops over 5 layers of {arguments.recipe}")
    show(results, of_operators)
    print("\n".join(crossovers(results)))


if __name__ == "__main__":
    main()
