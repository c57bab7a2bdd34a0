"""Training runs through the real launcher: layouts, resumption and recovery against straight runs."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from harness import ROOT, TINY, environment, kill_all, launch, losses, metrics, run_script, train

from lt2titan.metrics.trace_summary import OUTSIDE, read_trace, render, summarize

GOLDEN = ROOT / "tests" / "assets" / "golden_losses.json"
EVERY_STEP = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "loops",
    "tokens_per_second",
    "tokens_seen",
    "mfu",
    "tflops",
    "memory_gib",
    "data_wait_fraction",
    "skipped_steps",
    "time",
}
LOOPS = {f"{family}/loop_{t}" for family in ("residual_rms", "relative_update", "rho") for t in (1, 2)}
LOOPS |= {"grad_norm/core", "grad_norm/rest"}
VALIDATION_LOOPS = {f"{family}/loop_{t}" for family in ("exit_loss", "first_token_mass") for t in (1, 2)}


def check_layout(ours: list[float], theirs: list[float]) -> None:
    """Equal to rounding at first; sums in another order then grow apart, from 1e-7 to some 1e-4 over twenty steps."""
    assert ours[:8] == pytest.approx(theirs[:8], rel=1e-5)
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps without interruption, what others are compared with."""
    folder = tmp_path_factory.mktemp("straight")
    train(folder)
    return folder


def test_golden_losses(straight: Path) -> None:
    """The first twenty losses are part of the project: regenerate the file only when a change means to move them."""
    assert losses(straight) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)


def test_metrics_and_run_folder(straight: Path) -> None:
    records = metrics(straight)
    assert [r["step"] for r in records] == list(range(1, 21))
    assert all(set(r) == EVERY_STEP | LOOPS for r in records)
    assert all(r["grad_norm"] == pytest.approx(math.hypot(r["grad_norm/core"], r["grad_norm/rest"])) for r in records)
    assert [r["tokens_seen"] for r in records] == [128 * n for n in range(1, 21)]
    assert all(r["mfu"] is None for r in records)  # no peak is known for a CPU
    assert records[4]["lr"] == pytest.approx(3e-3) and records[-1]["lr"] == pytest.approx(3e-4)
    validations = metrics(straight, "validation_loss")
    assert [r["step"] for r in validations] == [10, 20]
    assert all(r.keys() >= VALIDATION_LOOPS for r in validations)
    # A synthetic token stands for one byte, so both measures say the same.
    assert validations[0]["bits_per_byte"] == pytest.approx(validations[0]["validation_loss"] / math.log(2), rel=0.01)
    assert sorted(p.name for p in (straight / "checkpoint").iterdir()) == ["step-10", "step-20"]


def test_loop_diagnostics_change_nothing_but_the_record(straight: Path, tmp_path: Path) -> None:
    train(tmp_path, "--metrics.no_loop_diagnostics")
    records, validations = metrics(tmp_path), metrics(tmp_path, "validation_loss")
    assert all(set(r) == EVERY_STEP for r in records)
    assert all(not r.keys() & VALIDATION_LOOPS for r in validations)
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in records] == [r[key] for r in metrics(straight)], key
    theirs = metrics(straight, "validation_loss")
    assert [r["validation_loss"] for r in validations] == [r["validation_loss"] for r in theirs]


def test_saved_configuration_reproduces_the_run(straight: Path, tmp_path: Path) -> None:
    text = (straight / "config.toml").read_text()
    assert re.search(r"^# lt2titan \S+, commit \S+$", text, re.M) and "torch 2." in text
    train(tmp_path, config=straight / "config.toml")
    assert losses(tmp_path) == losses(straight)


def test_resumed_runs_equal_the_straight_run_bitwise(straight: Path, tmp_path: Path) -> None:
    horizon = ["--lr_scheduler.total_steps", "20", "--checkpoint.interval", "7"]
    train(tmp_path, "--training.steps", "7", *horizon)
    assert "resuming from" in train(tmp_path, "--training.steps", "14", *horizon)
    output = train(tmp_path, *horizon)
    assert re.search(r"resuming from \S+step-14", output)
    one, other = metrics(tmp_path), metrics(straight)
    assert [r["step"] for r in one] == [r["step"] for r in other]
    for key in ("loss", "grad_norm", "lr", "tokens_seen"):
        assert [r[key] for r in one] == [r[key] for r in other], key


def test_killed_run_resumes_without_losing_or_repeating_steps(straight: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(str(ROOT / "run_train.sh"), "--job.dump_folder", str(tmp_path), "--training.steps", "100000"),
            *("--lr_scheduler.total_steps", "20", "--checkpoint.interval", "5"),
        ],
        env=environment(CONFIG_FILE=str(TINY)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (tmp_path / "checkpoint" / "step-10" / ".metadata").exists():
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        kill_all(process)
    newest = max(int(p.name.split("-")[1]) for p in (tmp_path / "checkpoint").iterdir())
    steps = str(max(20, newest + 3))
    train(tmp_path, "--training.steps", steps, "--lr_scheduler.total_steps", "20")
    records = metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(1, int(steps) + 1))
    assert [r["loss"] for r in records][:20] == losses(straight)


@pytest.mark.parametrize(
    ("n_ranks", "overrides"),
    [
        pytest.param(2, [], id="two ranks"),
        pytest.param(1, ["--training.local_batch_size", "1"], id="accumulation"),
        pytest.param(2, ["--training.local_batch_size", "1"], id="two ranks with accumulation"),
        pytest.param(1, ["--activation_checkpoint.mode", "block"], id="recomputed blocks"),
    ],
)
def test_layouts_give_the_same_loss_curve(straight: Path, tmp_path: Path, n_ranks: int, overrides: list[str]) -> None:
    train(tmp_path, *overrides, n_ranks=n_ranks)
    check_layout(losses(tmp_path), losses(straight))
    ours, theirs = metrics(tmp_path, "validation_loss"), metrics(straight, "validation_loss")
    assert [r["validation_loss"] for r in ours] == pytest.approx([r["validation_loss"] for r in theirs], rel=1e-3)
    for key in LOOPS:
        assert [r[key] for r in metrics(tmp_path)][:8] == pytest.approx(
            [r[key] for r in metrics(straight)][:8], rel=1e-3
        ), key
    for key in VALIDATION_LOOPS:
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in theirs], rel=1e-2), key


def test_checkpoint_of_one_rank_continues_on_two(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "step-20")
    output = train(tmp_path / "run", n_ranks=2)
    assert "resuming from" in output
    check_layout(losses(tmp_path / "run"), losses(straight))


def test_packed_documents_train_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    docs = ["--training.dataset", "python_docs", "--model.vocab_size", "258", "--data.document_mask"]
    docs += ["--training.steps", "5", "--validation.no_enable", "--data.cache_folder", str(tmp_path / "cache")]
    train(tmp_path / "one", *docs)
    train(tmp_path / "two", *docs, n_ranks=2)
    check_layout(losses(tmp_path / "two"), losses(tmp_path / "one"))


def test_a_finished_run_can_be_extended(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    train(tmp_path / "run", "--training.steps", "23", "--lr_scheduler.total_steps", "20")
    assert [r["step"] for r in metrics(tmp_path / "run")] == list(range(1, 24))


def test_a_run_that_does_not_fit_says_what_to_change(tmp_path: Path) -> None:
    result = launch(tmp_path, "--model.ffn_dim", str(2**42))
    assert result.returncode != 0
    assert re.search(r"ERROR .*ried to allocate .*\n.*does not fit: .* lower training.local_batch_size", result.stdout)
    assert "Traceback" not in result.stdout.split("does not fit")[0]


def test_training_stops_after_too_many_steps_that_are_not_finite(tmp_path: Path) -> None:
    """A learning rate of 1e30 poisons every step after the first; none of them may be applied."""
    overrides = ["--optimizer.lr", "1e30", "--lr_scheduler.warmup_steps", "0", "--training.max_skipped_steps", "3"]
    result = launch(tmp_path, *overrides, "--validation.no_enable")
    assert result.returncode != 0
    assert "3 steps in a row had a loss or gradient that is not finite" in result.stdout
    assert "Traceback" not in result.stdout.split("steps in a row")[0]
    records = metrics(tmp_path)
    assert records[-1]["loss"] is None and records[-1]["skipped_steps"] >= 2


@pytest.mark.parametrize("mixer", ["full", "window"])
def test_every_mixer_trains_alone(tmp_path: Path, mixer: str) -> None:
    overrides = ["--model.mixer", mixer, "--model.hybrid.mixer", "", "--training.steps", "3"]
    train(tmp_path, *overrides, "--validation.no_enable")
    assert all(math.isfinite(loss) for loss in losses(tmp_path))


def test_profiler_writes_a_trace_of_the_chosen_step(tmp_path: Path) -> None:
    """Every phase of docs/profiling.md in one step, and the loops and blocks of its passes."""
    profile = ["--profiling.enable_profiling", "--profiling.profile_freq", "3", "--profiling.profiler_warmup", "1"]
    train(tmp_path, *profile, "--training.steps", "3", "--training.gc_freq", "3", "--validation.freq", "3")
    folder = tmp_path / "profile_traces" / "iteration_3"
    assert [path.name for path in (tmp_path / "profile_traces").iterdir()] == ["iteration_3"]
    events = read_trace(folder / "rank0_trace.json.gz")
    summary = summarize(events)
    assert (summary.device, summary.n_steps) == ("cpu", 1)
    documented = re.search(r"^\| (`phase .*?) \|", (ROOT / "docs" / "profiling.md").read_text(), re.MULTILINE)
    assert documented is not None
    phases = {name.removeprefix("phase ") for name in re.findall("`(.+?)`", documented[1])}
    assert set(summary.phases) == phases | {OUTSIDE} and len(phases) == 11
    assert summary.accounted > 0.8  # the profiler's own work, between phases, takes a part of so short a step
    for of in (summary.loops, summary.kinds):
        assert all({"forward", "backward", "validation"} <= set(of[label]) for label in of if label != OUTSIDE), of
    assert set(summary.loops) == {"1", "2", OUTSIDE} and set(summary.kinds) == {"gdn", "full", OUTSIDE}
    visits = Counter(event.name for event in events if re.fullmatch(r"loop \d block \d \w+", event.name))
    kinds = ("gdn", "gdn", "full")
    assert set(visits) == {f"loop {t} block {i} {kind}" for t in (1, 2) for i, kind in enumerate(kinds)}
    assert (folder / "rank0_summary.txt").read_text() == render(summary)


def test_default_recipe_starts_on_two_ranks(tmp_path: Path) -> None:
    """The README's line, but for its length."""
    short = ["--training.steps", "2", "--validation.no_enable", "--checkpoint.no_enable"]
    run, cache = tmp_path / "run", str(tmp_path / "cache")
    train(run, *short, n_ranks=2, config=ROOT / "train_configs" / "lt2_debug.toml", XDG_CACHE_HOME=cache)
    assert len(losses(run)) == 2


def test_going_back_to_an_earlier_step_leaves_one_line_of_history(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    train(run, "--checkpoint.load_step", "10", "--training.steps", "15", "--optimizer.lr", "1e-4")
    output = train(run, "--training.steps", "18", "--optimizer.lr", "1e-4")
    assert re.search(r"resuming from \S+step-15", output)
    assert [r["step"] for r in metrics(run)] == list(range(1, 19))
    assert losses(run)[:10] == losses(straight)[:10] and losses(run)[11:] != losses(straight)[11:18]


def test_an_error_on_another_rank_is_shown(tmp_path: Path) -> None:
    """Rank 1 reads a broken shard of a stream; rank 0, whose output is shown, knows nothing of it."""
    table = pyarrow.table({"text": [f"document {i} " * 50 for i in range(200)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    broken = bytearray((tmp_path / "b.parquet").read_bytes())
    broken[4 : len(broken) // 2] = bytes(len(broken) // 2 - 4)
    (tmp_path / "b.parquet").write_bytes(broken)
    stream = ["--training.dataset", "huggingface", "--training.dataset_path", str(tmp_path), "--data.streaming"]
    stream += ["--model.vocab_size", "258", "--validation.no_enable", "--data.holdout_documents", "1"]
    result = launch(tmp_path / "run", *stream, n_ranks=2)
    assert result.returncode != 0
    assert "b.parquet" in result.stdout, result.stdout


def test_bad_configuration_is_refused_before_anything_starts(tmp_path: Path) -> None:
    result = launch(tmp_path / "run", "--training.stepz", "5")
    assert result.returncode == 2
    assert "--training.steps" in result.stdout and "Traceback" not in result.stdout
    assert not (tmp_path / "run").exists()


def test_scripts_read_a_run_folder(straight: Path, tmp_path: Path) -> None:
    result = run_script("evaluate.py", "--checkpoint", str(straight), "--batch-size", "4", "--json")
    assert result.returncode == 0, result.stderr
    expected = metrics(straight, "validation_loss")[-1]["validation_loss"]
    assert json.loads(result.stdout)["loss"] == pytest.approx(expected, rel=1e-6)
    converted = tmp_path / "model.safetensors"
    assert run_script("convert_checkpoint.py", str(straight), str(converted)).returncode == 0
    again = run_script("evaluate.py", "--checkpoint", str(converted), "--batch-size", "4", "--json")
    assert again.stdout == result.stdout, again.stderr
    plot = tmp_path / "plots" / "run.png"
    assert run_script("plot_run.py", str(straight), "--output", str(plot)).returncode == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
