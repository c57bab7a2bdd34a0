"""scripts/benchmark_training.py end to end on a model that trains in seconds."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from lt2titan.config.loader import load_config
from lt2titan.model.loop_schedule import LoopSchedule

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "tests" / "assets" / "tiny.toml"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_training.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def test_measures_cases_and_skips_those_that_are_done(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    common = [
        "--config",
        str(TINY),
        "--steps",
        "5",
        "--output",
        str(output),
        "--overrides",
        "compile.backend=aot_eager",
    ]
    # The cases that begin with "block-c", and the one that is profiled.
    result = run("--cases", "modes/block-c*", "profile/block-eager", *common)
    assert result.returncode == 0, result.stdout + result.stderr
    compiled, profiled = map(json.loads, output.read_text().splitlines())
    assert compiled["case"] == "modes/block-compiled" and profiled["case"] == "profile/block-eager"
    for row in (compiled, profiled):
        assert row["tokens_per_step"] == 4 * 32 and set(row["loops"]) == {2}
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens_per_step"] / row["ms"])
        assert abs(row["first_loss"] - math.log(64)) < 0.5 and math.isfinite(row["last_loss"])
        assert row["predicted_memory_gib"] > 0 and row["device"] == "CPU" and row["skipped_steps"] == 0
    assert len(compiled["step_ms"]) == 5 and compiled["profile"] is None
    # Two kinds of block and the loss, once: the estimate's own graphs do not count.
    assert compiled["compilation"]["graphs"] == 3 and compiled["compilation"]["recompiled"] == 0
    assert 0 < compiled["compilation"]["seconds"] <= compiled["compilation"]["warm_up_seconds"]
    assert profiled["compilation"] is None
    # The rest is what the profiler itself does between phases, a part of a short step that varies.
    assert profiled["profile"]["accounted"] > 0.5
    assert {"data", "forward", "backward", "clip", "optimizer"} <= profiled["profile"]["phases"].keys()
    again = run("--cases", "modes/block-c*", *common, "--skip-done")
    assert again.returncode == 0 and "modes/block-compiled: done already" in again.stdout
    assert len(output.read_text().splitlines()) == 2


def test_a_case_that_takes_too_long_is_a_result_with_an_error(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    arguments = ["--cases", "modes/block-eager", "--config", str(TINY), "--timeout", "1", "--output", str(output)]
    result = run(*arguments)
    assert result.returncode == 1 and "1 failed" in result.stderr
    assert "not done after 1 s" in json.loads(output.read_text())["error"]


def test_no_case_outlives_a_run_that_is_terminated(tmp_path: Path) -> None:
    script = str(ROOT / "scripts" / "benchmark_training.py")
    arguments = ["--cases", "modes/block-eager", "--config", str(TINY), "--steps", "5000"]
    command = [sys.executable, script, *arguments, "--output", str(tmp_path / "results.jsonl")]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    cases: list[psutil.Process] = []
    try:
        while not (cases := measuring(process)):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        _, said = process.communicate(timeout=200)
        assert b"terminated" in said
        _, alive = psutil.wait_procs(cases, timeout=200)
        assert not alive
    finally:
        for left in [process, *cases]:
            with suppress(psutil.NoSuchProcess):
                left.kill()


def measuring(process: psutil.Popen) -> list[psutil.Process]:
    found = []
    for child in process.children():
        with suppress(psutil.NoSuchProcess):  # some live for moments
            found += [child] if "measure_training" in " ".join(child.cmdline()) else []
    return found


def test_a_case_that_is_just_being_started_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark_training
    from training_cases import CASES

    started: list[subprocess.Popen[bytes]] = []
    is_over = threading.Event()
    threading.Thread(target=is_over.wait).start()  # takes signals that are blocked in the main thread alone

    def start(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **options))
        os.kill(os.getpid(), signal.SIGTERM)  # before the caller knows of its process
        time.sleep(0.2)  # for another thread to take it
        return started[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    arguments = benchmark_training.Arguments(config=TINY, steps=5000, output=tmp_path / "results.jsonl")
    interrupt, before = (
        signal.getsignal(signal.SIGINT),
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated")),
    )
    try:
        with pytest.raises(SystemExit, match="terminated"):
            benchmark_training.run("modes/block-eager", CASES["modes/block-eager"], arguments, 0)
        assert started[0].wait(timeout=10) == -signal.SIGKILL
    finally:
        is_over.set()
        signal.signal(signal.SIGTERM, before)
        started[0].kill()
    assert signal.getsignal(signal.SIGINT) is interrupt


def test_mistakes_are_refused_before_anything_runs(tmp_path: Path) -> None:
    result = run("--cases", "mode/*")
    assert result.returncode == 1 and "mode/*: there are modes/none-eager" in result.stderr
    output = tmp_path / "results.jsonl"
    result = run("--config", str(TINY), "--overrides", "model.nloops=3", "--output", str(output))
    assert result.returncode == 2 and "model.n_loops" in result.stdout + result.stderr and not output.exists()


def test_a_measurement_is_not_changed_in_passing() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "measure_training.py"), "--config", str(TINY)]
    result = subprocess.run([*script, "--metrics.log_freq", "7"], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1 and "--metrics.log_freq 7: leave it out" in result.stderr
    for override, says in (("training.steps=7", "steps 7"), ("profiling.enable_profiling", "enable_profiling True")):
        result = run("--config", str(TINY), "--cases", "modes/none-eager", "--overrides", override)
        assert result.returncode == 1 and f"{says}: leave it out" in result.stderr


def test_sampled_loops_are_compared_with_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else fixed and sampled loops would be two amounts of work."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from training_cases import CASES

    sampled, fixed = (
        load_config(TINY, [f"--{override}" for override in CASES[f"schedule/{kind}"].overrides])
        for kind in ("sampled", "fixed")
    )
    schedule = LoopSchedule(sampled.model.loop, sampled.model.n_loops, sampled.debug.seed)
    measured = [schedule.loops(step) for step in range(4, 4 + CASES["schedule/sampled"].n_steps)]  # 3 of warm-up before
    assert sorted(measured) == [1, 2, 3, 4, 5, 6, 7] and fixed.model.n_loops == 4
