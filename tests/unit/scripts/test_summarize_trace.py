"""scripts/summarize_trace.py on a trace that the profiler wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from lt2titan.metrics.config import ProfilingConfig
from lt2titan.metrics.profiler import maybe_profile

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "summarize_trace.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = ProfilingConfig(enable_profiling=True, profile_freq=2, profiler_warmup=1)
    with maybe_profile(config, folder, rank=0) as profiler:
        for _ in range(2):
            with record_function("phase forward"):
                torch.ones(300, 300) @ torch.ones(300, 300)
            profiler.step()
    return folder / "profile_traces/iteration_2/rank0_trace.json.gz"


def test_text_and_json(trace: Path) -> None:
    text = run(str(trace))
    assert text.returncode == 0, text.stderr
    assert text.stdout == (trace.parent / "rank0_summary.txt").read_text()
    result = run(str(trace), "--json", "--top", "1")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    everything = json.loads(run(str(trace), "--json").stdout)["operations"]
    assert list(summary["operations"]) == list(everything)[:1] and "aten::mm" in everything
    assert summary["idle_share"] == pytest.approx(summary["idle"] / summary["step"])


def test_errors_name_the_way_out(tmp_path: Path, trace: Path) -> None:
    result = run(str(tmp_path / "none.json"))
    assert result.returncode == 1 and "none.json: cannot be read" in result.stderr
    result = run(str(trace), "--top", "0")
    assert result.returncode == 1 and "--top = 0: must be positive" in result.stderr
