"""Traces of chosen steps with torch.profiler, a summary of each, and snapshots of CUDA memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, schedule
from torch.utils.checkpoint import set_checkpoint_early_stop

from lt2titan.config.section import ConfigError
from lt2titan.metrics.config import ProfilingConfig
from lt2titan.metrics.profile_ranges import LoopRanges
from lt2titan.metrics.trace_summary import read_trace, render, summarize
from lt2titan.model.lt2 import LT2

logger = logging.getLogger("lt2titan")

_RECORDING = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)


class StepProfiler(Protocol):
    def step(self) -> None:
        """Tell the profiler that a training step is over; call it once per step."""


class NoProfiler:
    """What profiles nothing."""

    def step(self) -> None:
        pass


@contextmanager
def maybe_profile(
    config: ProfilingConfig,
    dump_folder: str | Path,
    *,
    rank: int,
    start_step: int = 0,
    model: LT2 | None = None,
    device: torch.device | None = None,
    paused: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[StepProfiler]:
    """Profile the training loop inside the context, if ``config`` says so.

    Of every ``profile_freq`` steps the last ``profiler_active`` are recorded, after ``profiler_warmup`` of
    warm-up, into ``dump_folder/save_traces_folder/iteration_N/rank{rank}_trace.json.gz``, with a summary beside it
    (rank{rank}_summary.txt). N is the last recorded step, counted like the trainer's (from 1, going on after
    ``start_step`` in a resumed run). Memory snapshots are written at the same steps.

    Args:
        model: its loops and blocks are named in the traces; None names none.
        device: what is trained on; None is the CPU.
        paused: makes a context that leaves the writing of a trace out of what is timed.

    Raises:
        ConfigError: memory snapshots are wanted of a CPU.
    """
    device = device or torch.device("cpu")
    if config.enable_memory_snapshot and device.type != "cuda":
        reason = f"snapshots are of CUDA memory and this run is on {device.type}; set it to false"
        raise ConfigError("profiling.enable_memory_snapshot", True, reason)
    snapshots = _MemorySnapshots(config, Path(dump_folder), rank, start_step) if config.enable_memory_snapshot else None
    with _traces(config, Path(dump_folder), rank, start_step, model, device, paused) as traces:
        if snapshots is None:
            yield traces
        else:
            # To stop recomputing early torch raises an exception, which is lost when what is freed on its way out is
            # recorded ("returned NULL without setting an exception", torch 2.11).
            with set_checkpoint_early_stop(False), snapshots:
                yield _Both(traces, snapshots)


class _Both:
    def __init__(self, *profilers: StepProfiler) -> None:
        self._profilers = profilers

    def step(self) -> None:
        for profiler in self._profilers:
            profiler.step()


@contextmanager
def _traces(
    config: ProfilingConfig,
    dump_folder: Path,
    rank: int,
    start_step: int,
    model: LT2 | None,
    device: torch.device,
    paused: Callable[[], AbstractContextManager[None]],
) -> Iterator[StepProfiler]:
    if not config.enable_profiling:
        yield NoProfiler()
        return

    cycle = schedule(
        wait=config.profile_freq - config.profiler_active - config.profiler_warmup,
        warmup=config.profiler_warmup,
        active=config.profiler_active,
    )
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)

    saved, has_failed = start_step, False

    def save(profiler: profile) -> None:
        nonlocal saved
        step = start_step + profiler.step_num
        if step == saved or has_failed:  # the run ended at the very start of a trace, or within a step of it
            return
        saved = step
        folder = dump_folder / config.save_traces_folder / f"iteration_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        trace = folder / f"rank{rank}_trace.json.gz"
        text = folder / f"rank{rank}_summary.txt"
        with paused():
            profiler.export_chrome_trace(str(trace))
            summary = summarize(read_trace(trace))
            text.write_text(render(summary))
        logger.info(
            "profiler: wrote %s; the %s was idle for %.1f %% of the step; where the rest went: %s",
            trace,
            "device" if summary.device == "gpu" else "main thread",
            100 * summary.idle_share,
            text,
        )

    logger.info("profiler: tracing %d of every %d steps", config.profiler_active, config.profile_freq)
    with profile(
        activities=activities,
        # torch counts from 0 in every process; the shift keeps the traced steps the same after a resume.
        schedule=lambda num_done: cycle(start_step + num_done),
        on_trace_ready=save,
        record_shapes=True,
    ) as profiler:
        named = _NamedSteps(profiler, model, device)
        try:
            yield named
        except BaseException:
            has_failed = True
            raise
        finally:
            named.close()


class _NamedSteps:
    """Names loops and blocks while torch's profiler records, and starts each trace with an idle device."""

    def __init__(self, profiler: profile, model: LT2 | None, device: torch.device) -> None:
        self._profiler, self._model, self._device = profiler, model, device
        self._ranges: LoopRanges | None = None
        self._name()

    def step(self) -> None:
        following = self._profiler.schedule(self._profiler.step_num + 1)
        if following in _RECORDING and self._profiler.current_action not in _RECORDING and self._device.type == "cuda":
            # What was launched before a trace is not in it: the device would seem idle while it catches up.
            torch.cuda.synchronize(self._device)
        self._profiler.step()
        self._name()

    def _name(self) -> None:
        is_recording = self._profiler.current_action in _RECORDING
        if is_recording and self._ranges is None and self._model is not None:
            self._ranges = LoopRanges(self._model)
        elif not is_recording:
            self.close()

    def close(self) -> None:
        if self._ranges is not None:
            self._ranges.detach()
            self._ranges = None


class _MemorySnapshots:
    """Every ``profile_freq`` steps, and when memory runs out, what CUDA memory holds and where it was allocated."""

    def __init__(self, config: ProfilingConfig, dump_folder: Path, rank: int, start_step: int) -> None:
        self._config, self._step = config, start_step
        self._folder = dump_folder / config.save_memory_snapshot_folder
        self._file = f"rank{rank}_memory_snapshot.pickle"

    def __enter__(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=self._config.memory_snapshot_max_entries)
        logger.info("profiler: recording memory, a snapshot every %d steps", self._config.profile_freq)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._dump(f"iteration_{self._step + 1}_out_of_memory")
        torch.cuda.memory._record_memory_history(enabled=None)

    def step(self) -> None:
        self._step += 1
        if self._step % self._config.profile_freq == 0:
            self._dump(f"iteration_{self._step}")

    def _dump(self, name: str) -> None:
        target = self._folder / name / self._file
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(target))
        logger.info("profiler: wrote %s", target)
