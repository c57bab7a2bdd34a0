"""torch.profiler traces of chosen steps, one Perfetto file per rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from lt2titan.metrics.config import ProfilingConfig

logger = logging.getLogger("lt2titan")


class StepProfiler(Protocol):
    def step(self) -> None:
        """Tell the profiler that a training step is over; call it once per step."""


class NoProfiler:
    """What `maybe_profile` yields when profiling is off."""

    def step(self) -> None:
        pass


@contextmanager
def maybe_profile(
    config: ProfilingConfig, dump_folder: str | Path, *, rank: int, start_step: int = 0
) -> Iterator[StepProfiler]:
    """Profile the training loop inside the context, if ``config`` says so.

    Of every ``profile_freq`` steps the last ``profiler_active`` are recorded, after ``profiler_warmup`` of
    warm-up, into ``dump_folder/save_traces_folder/iteration_N/rank{rank}_trace.json.gz``. N is the last
    recorded step, counted like the trainer's (from 1, going on after ``start_step`` in a resumed run).
    """
    if not config.enable_profiling:
        yield NoProfiler()
        return

    folder = Path(dump_folder) / config.save_traces_folder
    cycle = schedule(
        wait=config.profile_freq - config.profiler_active - config.profiler_warmup,
        warmup=config.profiler_warmup,
        active=config.profiler_active,
    )
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)

    def save(profiler: profile) -> None:
        target = folder / f"iteration_{start_step + profiler.step_num}" / f"rank{rank}_trace.json.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(target))
        logger.info("profiler: wrote %s", target)

    logger.info("profiler: tracing %d of every %d steps", config.profiler_active, config.profile_freq)
    with profile(
        activities=activities,
        # torch counts from 0 in every process; the shift keeps the traced steps the same after a resume.
        schedule=lambda num_done: cycle(start_step + num_done),
        on_trace_ready=save,
        record_shapes=True,
    ) as profiler:
        yield profiler
