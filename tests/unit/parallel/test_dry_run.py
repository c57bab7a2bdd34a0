"""A dry run of many processes against shards and estimates counted otherwise, and its start by run_train.sh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

from lt2titan.config.job import JobConfig
from lt2titan.config.loader import load_config
from lt2titan.config.section import ConfigError
from lt2titan.dry_run import ESTIMATED, dry_run
from lt2titan.model.init import build_on_meta
from lt2titan.model.layers import Linear
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


@pytest.mark.parametrize(
    "overrides",
    [
        "--activation_checkpoint.mode selective",
        "--activation_checkpoint.mode nested --parallelism.tensor_parallel_degree 2",
        "--activation_checkpoint.mode none --comm.device_memory_gib 0.001",  # auto has to give way
        "--activation_checkpoint.mode memory_budget --compile.enable --float8.recipe tensorwise --float8.min_size 16",
        pytest.param(
            "--parallelism.fsdp_loop_reshard per_visit --compile.enable "
            "--float8.recipe tensorwise --float8.min_size 16",
            marks=pytest.mark.wide,
        ),
    ],
)
def test_memory_is_what_the_estimate_says(overrides: str) -> None:
    """Whose own tests compare it with what is allocated."""
    pytest.importorskip("torchao")
    found, config = sizes(4, *overrides.split(), "--float8.no_auto_filter")
    estimate_layout = run_path(str(ROOT / "scripts" / "estimate.py"))["estimate_layout"]
    expected = estimate_layout(config, 4)["memory_bytes"]
    assert {name: found[name] for name in ESTIMATED} == {name: expected[name] for name in ESTIMATED}
    shards = ("weights", "gradients")
    assert [found[name] for name in shards] == pytest.approx([expected[name] for name in shards], rel=0.05)


def test_what_a_gpu_would_refuse_is_refused() -> None:
    """Products in float8 are emulated, which takes any number of tokens."""
    pytest.importorskip("torchao")
    lengths = ("--training.seq_len", "31", "--validation.seq_len", "31")
    with pytest.raises(ConfigError, match="62 tokens per rank"):
        sizes(4, "--float8.recipe", "tensorwise", "--float8.min_size", "16", "--float8.allow_eager", *lengths)
    with pytest.raises(ConfigError, match="slower than bfloat16 without compilation"):
        sizes(4, "--float8.recipe", "tensorwise", "--float8.min_size", "16")


@pytest.mark.parametrize("policy", ["per_pass", "per_visit"])
def test_policies_keep_less(policy: str) -> None:
    options = ("--model.n_layers", "5", "--training.global_batch_size", "64")
    found, _ = sizes(4, "--parallelism.fsdp_loop_reshard", policy, *options)
    whole, _ = sizes(4, *options)
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
        timeout=500,
    )


def test_run_train(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    degrees = {"data_parallel_replicate_degree": 16, "context_parallel_degree": 4, "tensor_parallel_degree": 2}
    layout = [text for name, degree in degrees.items() for text in (f"--parallelism.{name}", str(degree))]
    result = launch("--comm.mode", "fake_backend", "--job.dump_folder", str(folder), *BATCH, *layout, NGPU="512")
    assert result.returncode == 0, result.stdout
    assert "replicate 16 x shard 4 x context 4 x tensor 2" in result.stdout
    assert "dry run: 512 processes" in result.stdout
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


FLOAT8 = ("--float8.recipe", "tensorwise", "--float8.no_auto_filter", "--float8.allow_eager")


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
