from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lt2titan.metrics.jsonl import JsonlSink, MetricsWriteError
from lt2titan.metrics.record import TrainingRecord, ValidationRecord


def record(step: int, **changes: Any) -> TrainingRecord:
    values: dict[str, Any] = {
        "step": step,
        "loss": 1 / step,
        "grad_norm": 0.5,
        "lr": 3e-4,
        "loops": 4,
        "tokens_per_second": 1000.0,
        "tokens_seen": 64 * step,
        "mfu": 0.4,
        "tflops": 300.0,
        "memory_gib": 2.0,
        "data_wait_fraction": 0.01,
        "skipped_steps": 0,
    }
    return TrainingRecord(**(values | changes))


def read_strictly(path: Path) -> list[dict[str, Any]]:
    """JSON as the standard has it: Python's parser alone would also take NaN and Infinity."""

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is not JSON")

    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_strictly(path)]


def write(path: Path, first: int, last: int, resume_step: int = 0) -> None:
    sink = JsonlSink(path, resume_step)
    for step in range(first, last + 1):
        sink.write(record(step))
    sink.close(failed=False)


def test_lines_carry_the_documented_fields(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(record(7, time=1700000000.5, extra={"loss_loop_1": 3.5}))
    sink.write(ValidationRecord(step=7, validation_loss=2.5, bits_per_byte=1.25, time=1700000001.0))
    training, validation = read_strictly(path)  # before close: every line is out at once
    assert training == {
        "step": 7,
        "loss": 1 / 7,
        "grad_norm": 0.5,
        "lr": 3e-4,
        "loops": 4,
        "tokens_per_second": 1000.0,
        "tokens_seen": 448,
        "mfu": 0.4,
        "tflops": 300.0,
        "memory_gib": 2.0,
        "data_wait_fraction": 0.01,
        "skipped_steps": 0,
        "time": 1700000000.5,
        "loss_loop_1": 3.5,
    }
    assert validation == {"step": 7, "validation_loss": 2.5, "bits_per_byte": 1.25, "time": 1700000001.0}
    sink.close(failed=False)


def test_non_finite_and_unknown_numbers_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(record(1, loss=math.nan, grad_norm=math.inf, lr=-math.inf, mfu=None))
    sink.close(failed=False)
    (line,) = read_strictly(path)
    assert [line[key] for key in ("loss", "grad_norm", "lr", "mfu")] == [None] * 4


def test_extra_metric_may_not_replace_a_field(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="loss"):
        sink.write(record(1, extra={"loss": 0.0}))
    sink.close(failed=False)


def test_resume_neither_repeats_nor_misses_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 9)
    before = path.read_bytes().splitlines(keepends=True)
    write(path, 6, 12, resume_step=5)
    assert steps(path) == list(range(1, 13))
    assert path.read_bytes().splitlines(keepends=True)[:5] == before[:5]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_after_a_kill_in_the_middle_of_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 4)
    whole = path.read_bytes()
    last_line_start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last_line_start + 1, len(whole)):  # torn anywhere, up to a missing newline alone
        path.write_bytes(whole[:cut])
        caplog.clear()
        write(path, 4, 6, resume_step=3)
        assert steps(path) == [1, 2, 3, 4, 5, 6], cut
    path.write_bytes(whole + b'{"step": 5, "lo')
    write(path, 5, 6, resume_step=4)
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert "unreadable lines [5]" in caplog.text


def test_complete_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3)
    path.write_bytes(path.read_bytes()[:-1])
    write(path, 4, 4, resume_step=3)
    assert steps(path) == [1, 2, 3, 4]


def test_validation_lines_are_cut_at_the_same_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in (2, 4, 6):
        sink.write(record(step))
        sink.write(ValidationRecord(step=step, validation_loss=1.0, bits_per_byte=1.0))
    sink.close(failed=True)
    JsonlSink(path, resume_step=4).close(failed=False)
    assert steps(path) == [2, 2, 4, 4]


def test_fresh_start_in_a_used_folder_keeps_the_earlier_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    earlier: list[bytes] = []
    for last in (3, 4, 2):
        sink = JsonlSink(path)
        sink.write(ValidationRecord(step=0, validation_loss=5.0, bits_per_byte=8.0))
        for step in range(1, last + 1):
            sink.write(record(step))
        sink.close(failed=False)
        earlier.append(path.read_bytes())
    assert steps(path) == [0, 1, 2]
    assert [(tmp_path / f"metrics.jsonl.{n}").read_bytes() for n in (1, 2)] == earlier[:2]
    assert [record.getMessage().split("kept as ")[1] for record in caplog.records] == [f"{path}.1", f"{path}.2"]
    JsonlSink(tmp_path / "new.jsonl").close(failed=False)
    JsonlSink(tmp_path / "new.jsonl").close(failed=False)  # nothing in it, nothing to keep
    assert len(list(tmp_path.iterdir())) == 4


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Makes the kernel refuse to grow a file beyond ``num_bytes``, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_refused_write_names_the_file_and_the_run_can_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    sink = JsonlSink(path, resume_step=2)
    with file_size_limit(path.stat().st_size + 20), pytest.raises(MetricsWriteError) as caught:
        sink.write(record(3))
    sink.close(failed=True)
    assert str(path) in str(caught.value)
    assert "resumes from its newest checkpoint" in str(caught.value)
    write(path, 3, 4, resume_step=2)  # the torn line is gone
    assert steps(path) == [1, 2, 3, 4]


def test_refused_truncation_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 5)
    old = path.read_bytes()
    with file_size_limit(20), pytest.raises(MetricsWriteError, match=r"metrics\.jsonl"):
        JsonlSink(path, resume_step=3)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
