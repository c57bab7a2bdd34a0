"""scripts/benchmark_sparse.py end to end on a model that trains in seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "tests" / "assets" / "tiny.toml"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_sparse.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_times_stacks_and_operators(tmp_path: Path) -> None:
    sparse = (
        "[model.mixers.nsa]\nn_heads = 4\nblock_size = 8\nn_blocks = 3\n[model.mixers.dsa]\nn_heads = 4\ntop_k = 8\n"
    )
    (tmp_path / "short.toml").write_text(f'base = "{TINY}"\n{sparse}')
    report = tmp_path / "report.json"
    sizes = ["--lengths", "48", "--repeats", "1", "--decode", "1"]
    result = run("--recipe", "short", "--recipes", str(tmp_path), *sizes, "--json", str(report))
    assert result.returncode == 0, result.stderr
    of_stacks, of_operators = (json.loads(report.read_text())[name] for name in ("stacks", "operators"))
    assert [row["stack"] for row in of_stacks] == ["full", "nsa", "dsa", "gdn+dsa"]
    assert all(row[f"{what}_ms"] > 0 for row in of_stacks for what in ("forward", "forward_backward", "decode"))
    assert len(of_operators) == 10 and all(0 < row["floor_ms"] < row["ms"] for row in of_operators)
    assert "dsa, forward_ms: " in result.stdout and "48" in result.stdout


def test_unknown_mixers_are_refused() -> None:
    result = run("--stacks", "gdn+das")
    assert result.returncode != 0 and "das: there are full, window" in result.stderr
