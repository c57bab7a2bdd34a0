"""Runs of the real launcher, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "assets" / "tiny.toml"


def environment(n_ranks: int = 1, **changes: str) -> dict[str, str]:
    """One thread per rank, so that sums do not depend on the machine."""
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "NGPU": str(n_ranks),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        **changes,
    }


def launch(
    folder: Path, *overrides: str, n_ranks: int = 1, config: Path = TINY, **changes: str
) -> subprocess.CompletedProcess[str]:
    """``./run_train.sh`` into ``folder``; output and errors together."""
    command = [str(ROOT / "run_train.sh"), "--job.dump_folder", str(folder), *overrides]
    process = subprocess.Popen(
        command,
        env=environment(n_ranks, CONFIG_FILE=str(config), **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=500)
    finally:
        kill_all(process)
    return subprocess.CompletedProcess(command, process.returncode, output)


def kill_all(process: subprocess.Popen[Any]) -> None:
    """``process`` and all that it has started: torchrun puts its workers into sessions of their own."""
    if process.poll() is None:
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):  # it has just ended by itself
                victim.kill()
    process.wait()


def train(folder: Path, *overrides: str, n_ranks: int = 1, **changes: Any) -> str:
    """A run that must succeed; returns its output."""
    result = launch(folder, *overrides, n_ranks=n_ranks, **changes)
    assert result.returncode == 0, result.stdout
    return result.stdout


def metrics(folder: Path, kind: str = "loss") -> list[dict[str, Any]]:
    """The records of metrics.jsonl that hold ``kind``: "loss" for training, "validation_loss" for validation."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if kind in record]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in metrics(folder)]


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script of ``scripts/``."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *arguments],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
