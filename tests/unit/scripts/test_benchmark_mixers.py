"""scripts/benchmark_mixers.py end to end on a model that trains in seconds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "tests" / "assets" / "tiny.toml"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_mixers.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_trains_and_decodes_a_mixer(tmp_path: Path) -> None:
    recipe = f'base = "{TINY}"\n[model]\nmixer = "window"\n[model.hybrid]\nmixer = ""\n'
    (tmp_path / "pure_window_tiny.toml").write_text(recipe)
    report = tmp_path / "report.json"
    sizes = ["--seq-len", "64", "--batch-size", "2", "--steps", "5", "--prompt", "70", "--decode", "6"]
    result = run("--mixers", "window", "--scale", "tiny", "--recipes", str(tmp_path), *sizes, "--json", str(report))
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(report.read_text())["results"]
    assert row["mixer"] == "window" and row["tokens_per_second"] > 0
    assert abs(row["first_loss"] - math.log(64)) < 0.5 and math.isfinite(row["last_loss"])
    assert 0 <= row["decode_error"] < 1e-5 and row["decode_state_bytes"]["per_token"] == 0


def test_unknown_mixers_are_refused() -> None:
    result = run("--mixers", "gdm")
    assert result.returncode != 0 and "gdm: there are full, window" in result.stderr
