from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from lt2titan.config.section import ConfigError
from lt2titan.metrics.config import ProfilingConfig
from lt2titan.metrics.profiler import maybe_profile


def train(config: ProfilingConfig, folder: Path, first: int, last: int, rank: int = 0) -> None:
    with maybe_profile(config, folder, rank=rank, start_step=first - 1) as profiler:
        for step in range(first, last + 1):
            with record_function(f"training_step_{step}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            profiler.step()


def traced_steps(path: Path) -> list[str]:
    trace = json.loads(gzip.decompress(path.read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert "aten::mm" in names
    return sorted({name for name in names if name.startswith("training_step_")})


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_step_that_fails_is_no_trace(tmp_path: Path) -> None:
    config = ProfilingConfig(enable_profiling=True, profile_freq=3, profiler_warmup=1, profiler_active=1)
    with pytest.raises(RuntimeError, match="fails"), maybe_profile(config, tmp_path, rank=0) as profiler:
        for step in range(1, 4):
            torch.ones(3).sum()
            if step == 3:
                raise RuntimeError("fails")
            profiler.step()
    assert not list(tmp_path.rglob("*trace*"))


def test_only_the_chosen_steps_are_traced(tmp_path: Path) -> None:
    config = ProfilingConfig(enable_profiling=True, profile_freq=5, profiler_active=1, profiler_warmup=2)
    train(config, tmp_path, 1, 12, rank=3)
    assert files(tmp_path) == [
        f"profile_traces/iteration_{n}/rank3_{what}" for n in (10, 5) for what in ("summary.txt", "trace.json.gz")
    ]
    for step in (5, 10):
        path = tmp_path / f"profile_traces/iteration_{step}/rank3_trace.json.gz"
        assert traced_steps(path) == [f"training_step_{step}"]


def test_a_resumed_run_traces_the_same_steps(tmp_path: Path) -> None:
    config = ProfilingConfig(
        enable_profiling=True,
        profile_freq=6,
        profiler_active=2,
        profiler_warmup=1,
        save_traces_folder="traces",
    )
    train(config, tmp_path, 5, 12)  # starts in the middle of a cycle, on a step that is recorded
    assert files(tmp_path) == [
        f"traces/iteration_{n}/rank0_{what}" for n in (12, 6) for what in ("summary.txt", "trace.json.gz")
    ]
    path = tmp_path / "traces/iteration_12/rank0_trace.json.gz"
    assert traced_steps(path) == ["training_step_11", "training_step_12"]


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_a_run_that_ends_where_a_trace_starts_keeps_the_last_one(tmp_path: Path) -> None:
    train(ProfilingConfig(enable_profiling=True, profile_freq=2, profiler_active=2, profiler_warmup=0), tmp_path, 1, 4)
    path = tmp_path / "profile_traces/iteration_4/rank0_trace.json.gz"
    assert traced_steps(path) == ["training_step_3", "training_step_4"]


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    train(ProfilingConfig(profile_freq=4), tmp_path, 1, 9)
    assert files(tmp_path) == []


def test_memory_snapshots_of_a_cpu_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"profiling.enable_memory_snapshot = True: .* on cpu; set it to false"),
        maybe_profile(ProfilingConfig(enable_memory_snapshot=True), tmp_path, rank=0, device=torch.device("cpu")),
    ):
        pass
    assert files(tmp_path) == []
