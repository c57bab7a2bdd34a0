from __future__ import annotations

import io
import os
import re
from typing import Any

import pytest

from lt2titan.metrics.console import ConsoleSink
from lt2titan.metrics.record import TrainingRecord, ValidationRecord

ESCAPE = "\x1b["


def record(step: int, **changes: Any) -> TrainingRecord:
    values: dict[str, Any] = {
        "step": step,
        "loss": 2.34567,
        "grad_norm": 0.9876,
        "lr": 3e-4,
        "loops": 4,
        "tokens_per_second": 12345.6,
        "tokens_seen": step,
        "mfu": 0.4567,
        "tflops": 450.0,
        "memory_gib": 71.234,
        "data_wait_fraction": 0.0,
        "skipped_steps": 0,
    }
    return TrainingRecord(**(values | changes))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def terminal_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "40")  # narrower than a line: lines must not wrap


def test_piped_training_line_is_plain_and_whole() -> None:
    out = io.StringIO()
    ConsoleSink(steps=1000, file=out, clock=Clock()).write(record(120))
    assert out.getvalue() == (
        "step  120/1000  12.0%  loss 2.3457  grad 0.988  lr 3.00e-04  tok/s 12,346  MFU 45.7%  "
        "mem 71.23 GiB  ETA 0:00:00\n"
    )


def test_unknown_mfu_data_wait_and_skipped_steps() -> None:
    out = io.StringIO()
    sink = ConsoleSink(steps=10, file=out)
    sink.write(record(10, mfu=None, data_wait_fraction=0.123, skipped_steps=2, loss=float("nan")))
    line = out.getvalue()
    assert "MFU n/a" in line
    assert "loss nan" in line
    assert line.endswith("data wait 12%  skipped 2\n")


def test_validation_line() -> None:
    out = io.StringIO()
    ConsoleSink(steps=200, file=out).write(ValidationRecord(step=50, validation_loss=1.23456, bits_per_byte=2.5))
    assert out.getvalue() == "step  50/200  25.0%  validation loss 1.2346  bits/byte 2.5000\n"


def test_time_left_leaves_the_first_interval_out() -> None:
    out, clock = io.StringIO(), Clock()
    sink = ConsoleSink(steps=110, resume_step=100, file=out, clock=clock)
    clock.now = 60.0  # the first step compiles; nothing better to go by: 9 steps of 60 s
    sink.write(record(101))
    clock.now = 70.0  # two steps of 5 s: 7 steps are left
    sink.write(record(103))
    assert re.findall(r"ETA (\S+)", out.getvalue()) == ["0:09:00", "0:00:35"]


def test_long_times_show_days() -> None:
    out, clock = io.StringIO(), Clock()
    sink = ConsoleSink(steps=255_000, file=out, clock=clock)
    clock.now = 1.0
    sink.write(record(1))
    assert out.getvalue().endswith("ETA 2d 22:49:59\n")


def print_on_a_terminal(color: bool) -> str:
    main, terminal = os.openpty()
    with os.fdopen(terminal, "w") as file:
        ConsoleSink(steps=10, color=color, file=file).write(record(5))
        printed = os.read(main, 4096).decode()
    os.close(main)
    return printed


def test_colours_on_a_terminal_only_when_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = print_on_a_terminal(color=True)
    assert ESCAPE in coloured
    plain = print_on_a_terminal(color=False)
    assert ESCAPE not in plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert print_on_a_terminal(color=True) == plain


def test_a_pipe_can_be_given_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    ConsoleSink(steps=10, file=out).write(record(5))
    assert ESCAPE in out.getvalue()
