"""One readable line per record on standard output, with progress and the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.text import Text

from lt2titan.metrics.record import Record, TrainingRecord, ValidationRecord


class ConsoleSink:
    """Prints plain lines; colours on a terminal, or where FORCE_COLOR is set (a terminal behind a pipe).

    ``steps`` is the last step of the run and ``resume_step`` the one it continues from.
    """

    def __init__(
        self,
        steps: int,
        resume_step: int = 0,
        color: bool = True,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps = steps
        self._console = Console(file=file, color_system="auto" if color else None, highlight=False)
        self._clock = clock
        # The time left is measured from the first logged step on: what comes before it holds compilation.
        self._origin = (resume_step, clock())
        self._seen_training = False

    def write(self, record: Record) -> None:
        line = self._training(record) if isinstance(record, TrainingRecord) else self._validation(record)
        self._console.print(line, soft_wrap=True)

    def close(self, failed: bool) -> None:
        """Nothing is pending: every line is flushed when it is printed."""

    def _progress(self, step: int) -> Text:
        percent = 100 * step / max(self.steps, 1)
        return Text(f"step {step:>{len(str(self.steps))}}/{self.steps} {percent:5.1f}%", style="cyan")

    def _training(self, record: TrainingRecord) -> Text:
        now = self._clock()
        eta = _duration(self._seconds_left(record.step, now))
        if not self._seen_training:
            self._origin, self._seen_training = (record.step, now), True
        parts = [
            self._progress(record.step),
            _number("loss", f"{record.loss:.4f}", "green" if math.isfinite(record.loss) else "red"),
            _number("grad", f"{record.grad_norm:.3f}", "blue" if math.isfinite(record.grad_norm) else "red"),
            _number("lr", f"{record.lr:.2e}", "blue"),
            _number("tok/s", f"{record.tokens_per_second:,.0f}", "magenta"),
            _number("MFU", "n/a" if record.mfu is None else f"{100 * record.mfu:.1f}%", "magenta"),
            _number("mem", f"{record.memory_gib:.2f} GiB", "yellow"),
            _number("ETA", eta, "cyan"),
        ]
        if record.data_wait_fraction >= 0.01:
            parts.append(_number("data wait", f"{100 * record.data_wait_fraction:.0f}%", "yellow"))
        if record.skipped_steps:
            parts.append(_number("skipped", str(record.skipped_steps), "red"))
        return Text("  ").join(parts)

    def _validation(self, record: ValidationRecord) -> Text:
        return Text("  ").join(
            [
                self._progress(record.step),
                _number("validation loss", f"{record.validation_loss:.4f}", "green"),
                _number("bits/byte", f"{record.bits_per_byte:.4f}", "green"),
            ]
        )

    def _seconds_left(self, step: int, now: float) -> float | None:
        origin_step, origin_time = self._origin
        done = step - origin_step
        return None if done <= 0 else (self.steps - step) * (now - origin_time) / done


def _number(label: str, value: str, style: str) -> Text:
    return Text.assemble(f"{label} ", (value, style))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d " * (days > 0) + f"{hour}:{minute:02d}:{second:02d}"
