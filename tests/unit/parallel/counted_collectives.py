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


def dtypes_that_travel(work: Callable[[], Any]) -> dict[str, set[str]]:
    """Dtypes of the tensors that FSDP2 gathers ("gather") and reduces ("reduce_scatter") in ``work``, as the profiler
    calls them. Of all-reduces, which take lists of tensors, it names none."""
    found: dict[str, set[str]] = {"gather": set(), "reduce_scatter": set()}
    for event in _events(work, record_shapes=True):
        for kind, name in (("gather", "c10d::_allgather_base_"), ("reduce_scatter", "c10d::_reduce_scatter_base_")):
            if event.name() == name:
                found[kind].update(event.dtypes()[:2])  # output and input
    return found


def event_names(work: Callable[[], Any]) -> list[str]:
    """What the profiler saw of ``work``, in the order in which it started."""
    return [event.name() for event in _events(work)]


def _events(work: Callable[[], Any], **options: bool) -> list[Any]:
    with profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        work()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()  # profiler.events() takes seconds to build
    return sorted(events, key=lambda event: event.start_ns())
