"""Runs with sampled loops, truncated backpropagation and validation after several loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import TINY, launch, losses, metrics, run_script, train

from lt2titan.config.loader import load_config
from lt2titan.model.flops import training_flops_per_token
from lt2titan.model.init import build_on_meta
from lt2titan.model.loop_schedule import LoopSchedule

N_STEPS = 8
MODEL = ["--model.n_loops", "3", "--model.loop.schedule", "uniform", "--model.loop.backward_loops", "2"]
RUN = [
    "--training.steps",
    "8",
    "--lr_scheduler.total_steps",
    "8",
    "--validation.freq",
    "4",
    "--validation.loops",
    "1",
    "3",
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled")
    output = train(folder, *MODEL, *RUN)
    assert "(uniform; 1: 0.333, 2: 0.333, 3: 0.333), mean 2, gradients through the last 2" in " ".join(output.split())
    return folder


def test_each_step_runs_and_counts_its_own_loops(straight: Path) -> None:
    config = load_config(TINY, MODEL)
    schedule, model = LoopSchedule(config.model.loop, 3, config.debug.seed), build_on_meta(config.model, "reference")
    records = metrics(straight)
    assert [r["loops"] for r in records] == [schedule.loops(step) for step in range(1, N_STEPS + 1)]
    assert {r["loops"] for r in records} == {1, 2, 3}
    for r in records:
        flops = training_flops_per_token(model, config.training.seq_len, r["loops"], min(r["loops"], 2)).model
        assert r["tflops"] / r["tokens_per_second"] * 1e12 == pytest.approx(flops)
        for family in ("residual_rms", "relative_update", "rho"):
            reported = {name for name in r if name.startswith(f"{family}/")}
            assert reported == {f"{family}/loop_{t}" for t in range(1, r["loops"] + 1)}


def test_validation_after_several_loops(straight: Path) -> None:
    for r in metrics(straight, "validation_loss"):
        assert {name for name in r if name.startswith("validation_loss/")} == {
            "validation_loss/loops_1",
            "validation_loss/loops_3",
        }
        assert r["validation_loss/loops_3"] == r["validation_loss"] != r["validation_loss/loops_1"]


def test_a_resumed_run_repeats_the_loops_bitwise(straight: Path, tmp_path: Path) -> None:
    train(tmp_path, *MODEL, *RUN, "--training.steps", "5")
    assert "resuming from" in train(tmp_path, *MODEL, *RUN)
    one, other = metrics(tmp_path), metrics(straight)
    for key in ("step", "loops", "loss", "grad_norm"):
        assert [r[key] for r in one] == [r[key] for r in other], key


def test_two_ranks_with_accumulation_run_the_same_loops(straight: Path, tmp_path: Path) -> None:
    train(tmp_path, *MODEL, *RUN, "--training.local_batch_size", "1", n_ranks=2)
    assert [r["loops"] for r in metrics(tmp_path)] == [r["loops"] for r in metrics(straight)]
    assert losses(tmp_path) == pytest.approx(losses(straight), rel=1e-5)
    for key in ("grad_norm", "residual_rms/loop_1"):
        assert [r[key] for r in metrics(tmp_path)] == pytest.approx([r[key] for r in metrics(straight)], rel=1e-3), key
    for key in ("validation_loss", "validation_loss/loops_1"):
        ours, theirs = metrics(tmp_path, key), metrics(straight, key)
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in theirs], rel=1e-4), key


def test_scripts_know_of_loops(straight: Path) -> None:
    common = ["--checkpoint", str(straight), "--batch-size", "4", "--json"]
    (_, last) = metrics(straight, "validation_loss")
    result = run_script("evaluate.py", *common)
    assert result.returncode == 0, result.stderr
    expected = {n: last[f"validation_loss/loops_{n}"] for n in ("1", "3")}  # the run's validation.loops
    assert json.loads(result.stdout)["loss_at"] == pytest.approx(expected, rel=1e-6)
    refused = run_script("evaluate.py", *common, "--loops", "4")
    assert "no more than model.n_loops = 3 loops" in refused.stderr and "Traceback" not in refused.stderr

    schedule = ["--model.loop.schedule", "list", "--model.loop.loops", "1", "1", "2"]
    result = run_script("estimate.py", "--config", str(TINY), "--json", *schedule)
    assert result.returncode == 0, result.stderr
    estimate = json.loads(result.stdout)
    model = build_on_meta(load_config(TINY, []).model, "reference")
    one, two = (training_flops_per_token(model, 32, n).model for n in (1, 2))
    assert estimate["mean_loops"] == pytest.approx(4 / 3)
    assert estimate["training_flops_per_token"] == pytest.approx((2 * one + two) / 3)


def test_growth_beyond_the_horizon_is_pointed_out() -> None:
    growth = ["--model.loop.schedule", "grow", "--model.loop.grow_steps"]
    assert load_config(TINY, [*growth, "19"]).warnings() == []
    (warning,) = load_config(TINY, [*growth, "20"]).warnings()
    assert "model.loop.grow_steps = 20" in warning and "2 loops are never trained" in warning


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.loop.schedule", "list", "--model.loop.loops", "1"], "its largest entry must be n_loops = 2"),
        (["--validation.loops", "4"], "no more than model.n_loops = 2 loops"),
    ],
)
def test_impossible_loops_are_refused_before_the_start(tmp_path: Path, overrides: list[str], message: str) -> None:
    result = launch(tmp_path, *overrides)
    assert result.returncode != 0
    assert message in " ".join(result.stdout.split()) and "Traceback" not in result.stdout
