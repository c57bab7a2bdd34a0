"""A dry run of many processes against sizes counted otherwise, and its start by run_train.sh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lt2titan.config.job import JobConfig
from lt2titan.config.loader import load_config
from lt2titan.dry_run import dry_run
from lt2titan.model.init import build_on_meta
from lt2titan.model.layers import Linear
from lt2titan.parallel.activation_checkpoint import recompute_plan
from lt2titan.parallel.activation_memory import core_memory
from lt2titan.parallel.distributed import fake_process_group

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "tests" / "assets" / "tiny.toml"
BATCH = ["--training.local_batch_size", "2", "--training.global_batch_size", "-1"]


def sizes(n_processes: int, *overrides: str) -> tuple[dict[str, int], JobConfig]:
    config = load_config(TINY, [*BATCH, *overrides], n_processes)
    with fake_process_group(n_processes):
        return dry_run(config), config


def first_shards(config: JobConfig, n_shards: int) -> int:
    """Elements of rank 0: FSDP2 cuts the first dimension into chunks of equal size, the last ones smaller or empty."""
    return sum(p.chunk(n_shards)[0].numel() for p in build_on_meta(config.model, "reference").parameters())


def test_shards_and_replicas() -> None:
    found, config = sizes(512, "--parallelism.data_parallel_replicate_degree", "64")
    parameters = sum(p.numel() for p in build_on_meta(config.model, "reference").parameters())
    shard = first_shards(config, 8)
    assert (found["parameters"], found["parameters per rank"]) == (parameters, shard)
    assert found["weights"] == found["gradients"] == 4 * shard
    # Two moments, and a step count for each parameter.
    assert 8 * shard < found["optimizer state"] < 8 * shard + 1000
    assert found["gathered parameters"] == found["whole gradients"] == 2 * parameters  # bf16


@pytest.mark.parametrize("mode", ["none", "selective", "block", "loop", "nested"])
def test_activations_are_those_of_a_real_pass(mode: str) -> None:
    """By the count that test_activation_checkpoint.py compares with what autograd and checkpoints really hold."""
    found, config = sizes(4, "--activation_checkpoint.mode", mode)
    model = build_on_meta(config.model, "fla")
    core = core_memory(model, batch_size=2, length=config.training.seq_len, dtype=torch.bfloat16)
    kept, in_backward, _ = core.under(recompute_plan(mode, 0))
    assert (found["activations kept"], found["activations in backward"]) == (kept, in_backward)
    resident = found["weights"] + found["optimizer state"] + found["gathered parameters"]
    assert resident + in_backward < found["peak"]


@pytest.mark.parametrize("policy", ["per_pass", "per_visit"])
def test_policies_keep_less(policy: str) -> None:
    found, _ = sizes(4, "--parallelism.fsdp_loop_reshard", policy, "--training.global_batch_size", "64")
    whole, _ = sizes(4, "--training.global_batch_size", "64")
    assert found["whole gradients"] == 4 * found["parameters"]  # deferred reductions, fp32
    assert found["activations kept"] == whole["activations kept"]
    is_less = found["gathered parameters"] < whole["gathered parameters"]
    assert is_less == (policy == "per_visit")


def launch(*overrides: str, config: Path = TINY, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "run_train.sh"), *overrides],
        env={**os.environ, "PYTHON": sys.executable, "CONFIG_FILE": str(config), "COLUMNS": "120", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def test_run_train(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = launch("--comm.mode", "fake_backend", "--job.dump_folder", str(folder), *BATCH, NGPU="512")
    assert result.returncode == 0, result.stdout
    assert "shard 512" in result.stdout and "dry run: 512 processes" in result.stdout
    assert not folder.exists()


def test_the_mode_is_not_for_files(tmp_path: Path) -> None:
    file = tmp_path / "dry.toml"
    file.write_text(f'base = "{TINY}"\n[comm]\nmode = "fake_backend"\n')
    result = launch(config=file)
    assert result.returncode == 2 and "comm.mode" in result.stdout, result.stdout


def test_layouts_are_checked_before() -> None:
    result = launch("--parallelism.data_parallel_replicate_degree", "3", NGPU="512", COMM_MODE="fake_backend")
    assert result.returncode == 2
    assert "512 processes" in result.stdout and "data_parallel_replicate_degree 3" in result.stdout


def test_context_ranks_are_shards_with_a_stretch_each() -> None:
    found, config = sizes(8, "--parallelism.context_parallel_degree", "4")
    shorter, _ = sizes(8, "--training.seq_len", "8", "--validation.seq_len", "8")
    assert found["weights"] == 4 * first_shards(config, 8)
    # As rows of a quarter, and what mixers fetch of other ranks beside it.
    assert shorter["activations kept"] < found["activations kept"] < 3 * shorter["activations kept"]


FLOAT8 = ("--float8.recipe", "tensorwise", "--float8.no_auto_filter")


def test_float8_gathers_one_byte_of_what_it_multiplies() -> None:
    pytest.importorskip("torchao")
    found, config = sizes(4, *FLOAT8, "--float8.min_size", "16")
    plain, _ = sizes(4)
    blocks = build_on_meta(config.model, "reference").core.blocks
    maps = sum(module.weight.numel() for module in blocks.modules() if isinstance(module, Linear))
    saved = plain["gathered parameters"] - found["gathered parameters"]
    assert maps // 2 < saved <= maps  # a byte each, of all but the smallest
    assert found["weights"] == plain["weights"]


def test_errors_while_it_is_laid_out_need_no_traceback() -> None:
    pytest.importorskip("torchao")
    result = launch("--comm.mode", "fake_backend", *BATCH, *FLOAT8, "--float8.min_size", "100000", NGPU="512")
    assert result.returncode != 0
    assert "no linear map of this model qualifies" in result.stdout and "Traceback" not in result.stdout, result.stdout


@pytest.mark.parametrize("mode", [pytest.param("selective", marks=pytest.mark.wide), "memory_budget"])
def test_compiled_blocks_are_estimated_as_compiled(mode: str) -> None:
    eager, _ = sizes(4, "--activation_checkpoint.mode", "none" if mode == "memory_budget" else mode)
    found, config = sizes(4, "--activation_checkpoint.mode", mode, "--compile.enable")
    budget = config.activation_checkpoint.memory_budget if mode == "memory_budget" else 1.0
    model, dtype = build_on_meta(config.model, "fla"), torch.bfloat16
    options = {"batch_size": 2, "length": config.training.seq_len, "dtype": dtype, "memory_budget": budget}
    core = core_memory(model, is_compiled=True, **options)  # type: ignore[arg-type]
    kept = core.under(recompute_plan("none" if mode == "memory_budget" else mode, 0)).kept
    assert found["activations kept"] == kept < eager["activations kept"]
