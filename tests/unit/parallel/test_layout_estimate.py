"""Memory and communication of a layout, against what was measured and what is counted elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lt2titan.config.loader import load_config
from lt2titan.layout_plan import convert_to_float8, core_of, estimate_memory
from lt2titan.model.init import build_on_meta
from lt2titan.model.lt2 import LT2
from lt2titan.parallel.activation_memory import core_memory
from lt2titan.parallel.communication_estimate import of_parameters
from lt2titan.parallel.layout import Layout
from lt2titan.parallel.layout_estimate import memory_by_category

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "train_configs" / "lt2_1.3b.toml"
ONE_GPU = Layout()


# (mode, sequences, microbatches, compiled, measured GiB): one H200, bf16; most of them in docs/benchmarks.md.
MEASURED = [
    ("block", 4, 1, False, 31.6),
    ("block", 4, 2, False, 36.8),
    ("selective", 1, 1, False, 43.5),
    ("none", 2, 1, False, 91.1),
    ("none", 2, 4, False, 97.6),
    ("block", 4, 1, True, 27.5),
    ("selective", 4, 1, True, 89.7),
    pytest.param("none", 2, 1, True, 79.8, marks=pytest.mark.wide),
    pytest.param("loop", 4, 1, True, 51.5, marks=pytest.mark.wide),
    pytest.param("nested", 4, 1, True, 26.2, marks=pytest.mark.wide),
    ("memory_budget", 4, 1, True, 78.7),
    ("selective", 4, 1, False, 100.2),
    ("loop", 4, 1, False, 56.3),
    ("nested", 4, 1, False, 27.4),
]


@pytest.mark.parametrize(("mode", "batch_size", "n_microbatches", "is_compiled", "measured_gib"), MEASURED)
def test_peak_of_the_1_3b_recipe_as_measured(
    mode: str, batch_size: int, n_microbatches: int, is_compiled: bool, measured_gib: float
) -> None:
    model = build_on_meta(load_config(RECIPE).model, "fla")
    core = core_memory(
        model,
        batch_size=batch_size,
        length=4096,
        dtype=torch.bfloat16,
        is_compiled=is_compiled,
        memory_budget=0.5 if mode == "memory_budget" else 1.0,
    )
    memory = memory_by_category(
        model,
        ONE_GPU,
        core,
        n_tokens=4096 * batch_size,
        dtype=torch.bfloat16,
        activation_checkpoint=mode,
        skip_last_loops=0,
        n_loops=4,
        n_backward_loops=0,
        is_compiled=is_compiled,
        n_microbatches=n_microbatches,
    )
    assert memory["peak"] / 2**30 == pytest.approx(measured_gib, rel=0.05 if is_compiled else 0.1)


# Compiled, in float8: (recipe, mode, sequences, measured GiB).
MEASURED_FLOAT8 = [
    ("tensorwise", "none", 2, 70.4),
    ("tensorwise", "selective", 4, 88.6),
    ("tensorwise", "loop", 4, 46.0),
    ("tensorwise", "nested", 4, 25.1),
    ("tensorwise", "block", 4, 26.3),
    ("tensorwise", "memory_budget", 4, 71.2),
    ("rowwise", "selective", 4, 89.7),
]


@pytest.mark.wide
@pytest.mark.parametrize(("recipe", "mode", "batch_size", "measured_gib"), MEASURED_FLOAT8)
def test_peak_of_the_1_3b_recipe_in_float8_as_measured(
    recipe: str, mode: str, batch_size: int, measured_gib: float
) -> None:
    pytest.importorskip("torchao", reason="float8 needs torchao")
    sizes = [f"--training.{name}_batch_size={batch_size}" for name in ("local", "global")]
    options = ["--compile.enable", f"--activation_checkpoint.mode={mode}", f"--float8.recipe={recipe}", *sizes]
    config = load_config(RECIPE, options)
    model = build_on_meta(config.model, "fla")
    convert_to_float8(config, model, 1)
    core = core_of(config, model, ONE_GPU, torch.bfloat16, is_compiled=True)
    memory = estimate_memory(config, model, ONE_GPU, core, torch.bfloat16, is_compiled=True)
    assert memory["peak"] / 2**30 == pytest.approx(measured_gib, rel=0.05)


SIZES: Any = {"n_loops": 4, "n_backward_loops": 0, "dtype": torch.bfloat16, "reduce_dtype": torch.float32}


@pytest.mark.parametrize(
    ("policy", "n_gathers"), [("per_step", 21), ("per_pass", 20 * 4 + 1), ("per_visit", (2 * 20 * 4 + 1) * 3)]
)
@pytest.mark.parametrize("defers", [False, True])
def test_collectives_as_fsdp_counts_them(policy: str, n_gathers: int, defers: bool) -> None:
    """parallel/fsdp.py states the counts, and test_fsdp.py asserts them of real runs; 20 blocks, T = 4, m = 3."""
    model = build_on_meta(load_config(RECIPE).model, "reference")
    layout = Layout(n_replicas=2, n_shards=8, loop_reshard=policy, defers_reductions=defers)
    result = of_parameters(model, layout, n_microbatches=3, **SIZES)
    gathers, scatters = (result[f"{kind} over shard ranks"] for kind in ("all-gather", "reduce-scatter"))
    sums = result["all-reduce over replicate ranks"]
    assert gathers.n_times == n_gathers
    assert scatters.n_times == sums.n_times == (2 * 20 + 1 if defers else 21 * 3)
    if policy == "per_step" and not defers:
        n_parameters = sum(p.numel() for p in model.parameters())
        assert gathers.n_bytes == n_parameters * 2 * 7 // 8
        assert scatters.n_bytes == 3 * n_parameters * 4 * 7 // 8
        assert sums.n_bytes == 3 * n_parameters * 4 // 8  # 2 (n - 1) / n of a shard, n = 2 replicas


@pytest.mark.parametrize(
    ("policy", "n_gathers"), [("per_step", 22), ("per_pass", 20 * 4 + 2), ("per_visit", (2 * 20 * 4 + 3) * 3)]
)
def test_an_untied_embedding_is_a_group_of_its_own(policy: str, n_gathers: int) -> None:
    model = build_on_meta(load_config(RECIPE, ["--model.no_tie_embeddings"]).model, "reference")
    result = of_parameters(model, Layout(n_shards=8, loop_reshard=policy), n_microbatches=3, **SIZES)
    assert result["all-gather over shard ranks"][0] == n_gathers
    assert result["reduce-scatter over shard ranks"][0] == 22 * 3
    assert result["reduce-scatter over shard ranks"][1] == 3 * sum(p.numel() for p in model.parameters()) * 4 * 7 // 8
    embedding, root = model.embedding.weight.numel(), model.head.weight.numel() + 2048 * (1 + 4)  # norm and rho
    blocks = sum(p.numel() for p in model.core.blocks.parameters())
    visits = {"per_step": (1, 1, 1), "per_pass": (1, 1, 4), "per_visit": (3 * 2, 3, 3 * 2 * 4)}[policy]
    gathered = sum(n * times for n, times in zip((embedding, root, blocks), visits, strict=True))
    assert result["all-gather over shard ranks"][1] == gathered * 2 * 7 // 8


def test_bytes_of_truncated_steps() -> None:
    """Untied, gradients through one of four loops, three microbatches: blocks are gathered five times each, the last of
    them a sixth time; the embedding, which has no gradient, once, and it is not reduced."""
    model = build_on_meta(load_config(RECIPE, ["--model.no_tie_embeddings"]).model, "reference")
    embedding = model.embedding.weight.numel()
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.core.blocks]
    root = sum(p.numel() for p in model.parameters()) - sum(blocks) - embedding
    layout = Layout(n_shards=8, loop_reshard="per_visit")
    result = of_parameters(model, layout, n_microbatches=3, **SIZES | {"n_backward_loops": 1})
    gathered = 3 * (5 * sum(blocks) + blocks[-1] + root + embedding)
    assert result["all-gather over shard ranks"] == (3 * (5 * 20 + 1 + 1 + 1), gathered * 2 * 7 // 8)
    assert result["reduce-scatter over shard ranks"] == (3 * 21, 3 * (sum(blocks) + root) * 4 * 7 // 8)


def layout_memory(model: LT2, **layout: Any) -> dict[str, int]:
    """Of a step of 512 tokens, all activations kept, over eight shards."""
    core = core_memory(model, batch_size=1, length=512, dtype=torch.bfloat16)
    sizes = {"n_tokens": 512, "skip_last_loops": 0, "n_loops": 4, "n_backward_loops": 0}
    options = {"dtype": torch.bfloat16, "activation_checkpoint": "none"}
    return memory_by_category(model, Layout(**{"n_shards": 8} | layout), core, **sizes, **options)  # type: ignore[arg-type]


def test_an_untied_embedding_is_freed_while_the_core_runs() -> None:
    """Under per_visit; it is back at the end, when its gradient is reduced, the peak of so few tokens and layers."""
    options = ["--model.no_tie_embeddings", "--model.n_layers", "5"]
    model = build_on_meta(load_config(RECIPE, options).model, "fla")
    kept, freed = (layout_memory(model, loop_reshard=policy) for policy in ("per_step", "per_visit"))
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.core.blocks]
    n_fewer = sum(blocks) - 3 * max(blocks)  # gathered
    assert kept["peak"] - freed["peak"] == 2 * n_fewer
    embedding = model.embedding.weight.numel()
    assert kept["gathered parameters"] - freed["gathered parameters"] == 2 * (n_fewer + embedding)


def test_shards_in_float8_are_kept_where_they_are_gathered_again() -> None:
    pytest.importorskip("torchao", reason="float8 needs torchao")
    config = load_config(RECIPE, ["--float8.recipe", "tensorwise", "--compile.enable"])
    model = build_on_meta(config.model, "fla")
    convert_to_float8(config, model, 8)
    n_float8 = sum(m.weight.numel() for m in model.modules() if type(m).__name__ == "Float8Linear")
    assert n_float8 > 1e9
    for policy, n_kept in (("per_step", 0), ("per_pass", n_float8), ("per_visit", n_float8)):
        found = layout_memory(model, loop_reshard=policy)
        offloaded = layout_memory(model, loop_reshard=policy, cpu_offload=True)
        assert found["weights in float8"] == offloaded["weights in float8"] == n_kept // 8
        assert found["peak"] - offloaded["peak"] == found["weights"] + found["optimizer state"]
        halved = layout_memory(model, loop_reshard=policy, n_shards=16)
        resident = ("weights", "weights in float8", "optimizer state")
        assert found["peak"] - halved["peak"] == sum(found[name] - halved[name] for name in resident)


def test_shares_add_up_to_the_whole() -> None:
    model = build_on_meta(load_config(RECIPE).model, "fla")
    core = core_memory(model, batch_size=1, length=512, dtype=torch.bfloat16)

    def memory(layout: Layout) -> dict[str, int]:
        sizes = {"n_tokens": 512, "skip_last_loops": 0, "n_loops": 4, "n_backward_loops": 0}
        return memory_by_category(model, layout, core, dtype=torch.bfloat16, activation_checkpoint="nested", **sizes)

    one, many = memory(ONE_GPU), memory(ONE_GPU._replace(n_shards=16))
    for name in ("weights", "gradients", "optimizer state"):
        assert many[name] == pytest.approx(one[name] / 16, rel=1e-6)
    assert many["gathered parameters"] == one["gathered parameters"]
    offloaded = memory(ONE_GPU._replace(cpu_offload=True))
    assert offloaded["weights"] == offloaded["optimizer state"] == 0


def test_the_script_reports_a_layout_and_refuses_one_that_does_not_fit() -> None:
    command = [sys.executable, str(ROOT / "scripts/estimate.py"), "--config", str(ROOT / "tests/assets/tiny.toml")]
    result = subprocess.run([*command, "--world-size", "4", "--json"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["layout"]["n_shards"] == 4 and report["memory_bytes"]["peak"] > 0
    assert list(report["activation_modes"]) == ["none", "selective", "block", "loop", "nested"]
    compiled = [*command, "--world-size", "4", "--compile.enable", "--activation_checkpoint.memory_budget", "0.2"]
    result = subprocess.run([*compiled, "--json"], capture_output=True, text=True, cwd=ROOT)
    modes = json.loads(result.stdout.splitlines()[-1])["activation_modes"]
    none, budgeted, block = (modes[mode]["activations kept"] for mode in ("none", "memory_budget", "block"))
    assert none > budgeted > block
    split = ["--parallelism.context_parallel_degree", "2", "--training.local_batch_size", "1"]
    result = subprocess.run([*command, "--world-size", "4", "--json", *split], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["layout"]["n_shards"] == 4 and report["communication"]["all-gather over context ranks"]["count"]
    split[1] = "3"
    result = subprocess.run([*command, "--world-size", "3", *split], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode != 0 and "does not divide training.seq_len = 32" in result.stderr
    result = subprocess.run([*command, "--world-size", "3"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode != 0 and "global_batch_size" in result.stderr
