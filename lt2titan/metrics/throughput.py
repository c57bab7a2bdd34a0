"""Throughput between two log records: tokens per second, TFLOP/s, MFU and the time spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ThroughputSample:
    tokens_per_second: float  # all ranks together
    tflops: float  # model TFLOP/s per device
    mfu: float | None  # fraction of the peak; None where the peak is unknown
    data_wait_fraction: float  # of the time of the steps, on this rank


class Throughput:
    """Accumulates steps until ``measure``, then starts over; the time runs from construction on.

    MFU = executed model FLOPs / (seconds * devices * peak). The FLOPs per token come with each step because a
    sampled loop count changes them. They hold no recompute, so MFU compares between checkpointing settings.

    Args:
        world_size: devices that share the work, whatever the parallel layout.
        peak_flops: dense bf16 peak of one device in FLOP/s (hardware.peak_flops), None if unknown.
        device: where the steps run; `measure` and `paused` synchronise CUDA, the per-step calls do not.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        world_size: int,
        peak_flops: float | None,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._world_size = world_size
        self._peak_flops = peak_flops
        self._device = torch.device(device)
        self._clock = clock
        self._restart()

    def add_step(self, num_tokens: int, flops_per_token: float) -> None:
        """Count a finished step of ``num_tokens`` tokens (all ranks, padding and masked targets included)."""
        self._num_tokens += num_tokens
        self._flops += num_tokens * flops_per_token

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Wrap the fetching of a batch: host time, not synchronised, so that it does not stall the device."""
        start = self._clock()
        try:
            yield
        finally:
            self._wait_seconds += self._clock() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wrap what is not training (validation, checkpoints): its time is left out of every figure.

        Waits for the device on both ends, as queued training work belongs to the steps: enter it only when
        there is something to leave out.
        """
        start = self._now()
        try:
            yield
        finally:
            self._paused_seconds += self._now() - start

    def measure(self) -> ThroughputSample:
        """The figures since the last call (or construction)."""
        if self._num_tokens == 0:
            raise ValueError("Throughput.measure() needs at least one add_step() since the previous measure()")
        seconds = self._now() - self._start - self._paused_seconds
        flops_per_second = self._flops / seconds / self._world_size
        sample = ThroughputSample(
            tokens_per_second=self._num_tokens / seconds,
            tflops=flops_per_second / 1e12,
            mfu=None if self._peak_flops is None else flops_per_second / self._peak_flops,
            data_wait_fraction=self._wait_seconds / seconds,
        )
        self._restart()
        return sample

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()

    def _restart(self) -> None:
        self._num_tokens = 0
        self._flops = 0.0
        self._wait_seconds = 0.0
        self._paused_seconds = 0.0
        self._start = self._clock()
