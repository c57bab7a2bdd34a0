"""MetricsLogger: one record in, every sink out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from lt2titan.metrics.config import MetricsConfig
from lt2titan.metrics.console import ConsoleSink
from lt2titan.metrics.jsonl import JsonlSink
from lt2titan.metrics.record import Record, Sink
from lt2titan.metrics.tensorboard import TensorBoardSink
from lt2titan.metrics.wandb import WandbSink

METRICS_FILE = "metrics.jsonl"


class MetricsLogger:
    """Writes records to `metrics.jsonl`, the console and, as configured, TensorBoard and W&B.

    Args:
        config: the [metrics] section.
        run_folder: where everything is written (`job.dump_folder`).
        steps: last step of the run, for progress and the time left.
        resume_step: the step of the loaded checkpoint, 0 for a fresh start. What an earlier process recorded
            after it is dropped, because this run records those steps again (W&B keeps it, see WandbSink); a
            fresh start keeps the whole of an earlier file under another name.
        is_main: only the logging rank opens anything; on the others every call does nothing.
        run_config: the resolved config, shown by W&B.

    Use it as a context manager, or call ``close``. Raises MetricsWriteError when the disk is full.
    """

    def __init__(
        self,
        config: MetricsConfig,
        run_folder: str | Path,
        *,
        steps: int,
        resume_step: int = 0,
        is_main: bool = True,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._log_freq, self._steps = config.log_freq, steps
        self._sinks: list[Sink] = []
        if not is_main:
            return
        folder = Path(run_folder)
        self._sinks.append(JsonlSink(folder / METRICS_FILE, resume_step))
        self._sinks.append(ConsoleSink(steps, resume_step, color=not config.disable_color_printing))
        if config.enable_tensorboard:
            self._sinks.append(TensorBoardSink(folder / config.save_tb_folder, resume_step))
        if config.enable_wandb:
            self._sinks.append(WandbSink(folder, config.wandb_project, config.wandb_run_name, resume_step, run_config))

    def should_log(self, step: int) -> bool:
        """Whether ``step`` (from 1) is logged; the same on all ranks, so that they can gather figures."""
        return step == 1 or step == self._steps or step % self._log_freq == 0

    def log(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)

    def close(self, failed: bool = False) -> None:
        """Close every sink, also when one of them fails to."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close, failed)
        self._sinks = []

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)
