"""What processes call of each other, as the profiler sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def collectives(work: Callable[[], Any]) -> Counter[str]:
    """How often ``work`` calls each collective ("gather", "reduce_scatter", "all_reduce"). By the profiler: a dispatch
    mode cannot look inside torch.func.vjp, which the reference operators use in their backward pass."""
    counted: Counter[str] = Counter()
    for name in event_names(work):
        for kind, part in (("gather", "allgather"), ("reduce_scatter", "reduce_scatter"), ("all_reduce", "allreduce")):
            counted[kind] += name.startswith("c10d::") and part in name
    return counted


def event_names(work: Callable[[], Any]) -> list[str]:
    """What the profiler saw of ``work``, in the order in which it started."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()  # profiler.events() takes seconds to build
    return [event.name() for event in sorted(events, key=lambda event: event.start_ns())]
