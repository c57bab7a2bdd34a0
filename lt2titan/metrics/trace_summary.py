"""Where a training step went, from a profiler trace: by phase, loop, kind of block and operation. Needs no torch.

On a GPU trace time is the device's: of kernels, copies and fills, each shared out over what it overlaps, so that all
times add up to the time in which the device was busy. On a CPU trace it is the main thread's, of operations without
those that they call. The rest of the step is idle, in the phase in which the host was at that time.
"""

from __future__ import annotations

import gzip
import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

OUTSIDE = "outside"
"""The phase, loop or kind of what lies in none."""

_STEP = re.compile(r"ProfilerStep#\d+")
_PHASE = re.compile(r"phase (?P<phase>.+)")
_BLOCK = re.compile(r"loop (?P<loop>\d+) block \d+ (?P<kind>\S+)")
_LOOP = re.compile(r"loop (?P<loop>\d+)")
_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_LAUNCH = frozenset({"cuda_runtime", "cuda_driver"})
_BACKWARD = "autograd::engine::evaluate_function: "


class TraceError(ValueError):
    """A file that is no trace of a training run; the message names it and says why."""


class Event(NamedTuple):
    """Times in microseconds on the trace's clock."""

    name: str
    category: str
    thread: Any
    start: float
    end: float
    args: dict[str, Any]


class Span(NamedTuple):
    start: float
    end: float
    label: str


class Work(NamedTuple):
    """One kernel or operation: time in microseconds, and what it belongs to."""

    name: str
    time: float
    phase: str
    loop: str
    kind: str


@dataclass
class Share:
    """Of a phase, in ms per step."""

    busy: float = 0.0
    idle: float = 0.0


@dataclass
class Operation:
    """A kernel or operation by name: ms per step, calls per step."""

    time: float = 0.0
    calls: float = 0.0


@dataclass
class Summary:
    """All times in ms per step."""

    device: str
    """"gpu": device time; "cpu": time of the main thread."""
    n_steps: int
    step: float
    busy: float
    idle: float
    accounted: float
    """Share of the step that lies in a named phase."""
    phases: dict[str, Share] = field(default_factory=dict)
    loops: dict[str, dict[str, float]] = field(default_factory=dict)
    """loop -> phase -> busy time"""
    kinds: dict[str, dict[str, float]] = field(default_factory=dict)
    """kind of block -> phase -> busy time"""
    operations: dict[str, Operation] = field(default_factory=dict)
    """Longest first."""

    @property
    def idle_share(self) -> float:
        return self.idle / self.step

    def as_dict(self, top: int = 0) -> dict[str, Any]:
        """For JSON; ``top`` > 0 keeps that many operations."""
        values = asdict(self) | {"idle_share": self.idle_share}
        values["operations"] = dict(list(values["operations"].items())[: top or None])
        return values


def read_trace(path: Path) -> list[Event]:
    """The complete events of a Chrome trace (.json or .json.gz), by start, the longest first.

    Raises:
        TraceError: the file cannot be read as one.
    """
    try:
        raw = path.read_bytes()
        content = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (EOFError, ValueError) as error:
        raise TraceError(f"{path}: is not JSON (.json or .json.gz): {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise TraceError(f"{path}: has no traceEvents; give a rankN_trace.json.gz that [profiling] wrote")
    events = [
        Event(
            entry["name"],
            entry.get("cat", ""),
            (entry.get("pid"), entry.get("tid")),
            float(entry["ts"]),
            float(entry["ts"]) + float(entry.get("dur", 0)),
            entry.get("args", {}),
        )
        for entry in content["traceEvents"]
        if entry.get("ph") == "X"
    ]
    if not any(_is_step(event) for event in events):
        raise TraceError(f"{path}: has no ProfilerStep# range; give a rankN_trace.json.gz that [profiling] wrote")
    return sorted(events, key=lambda event: (event.start, -event.end))


def summarize(events: Sequence[Event]) -> Summary:
    """Events as `read_trace` gives them."""
    steps = [event for event in events if _is_step(event)]
    main, start, end = steps[0].thread, steps[0].start, max(event.end for event in steps)
    host = Host(events, main)
    on_device = [event for event in events if event.category in _DEVICE and event.start >= start]
    if on_device:
        launches = {event.args.get("correlation"): event for event in events if event.category in _LAUNCH}
        # The device may finish a step after the host has left it.
        launched = [event for event in on_device if _launch_time(event, launches) <= end]
        end = max([end, *(event.end for event in launched)])
        work, gaps = _device_work(launched, launches, host, start, end)
    else:
        operations = [e for e in events if e.category == "cpu_op" and e.thread == main and start <= e.start < end]
        work, gaps = _main_thread_work(operations, host, start, end)
    return _add_up(work, gaps, host, device="gpu" if on_device else "cpu", n_steps=len(steps), duration=end - start)


def _is_step(event: Event) -> bool:
    return event.category == "user_annotation" and _STEP.fullmatch(event.name) is not None


class _Spans:
    """Spans of which no two overlap."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans = sorted(spans)
        self._starts = [span.start for span in self.spans]

    def at(self, time: float) -> str | None:
        i = bisect_right(self._starts, time) - 1
        return self.spans[i].label if i >= 0 and time < self.spans[i].end else None

    def overlaps(self, start: float, end: float) -> Iterable[tuple[str, float]]:
        """(label, time) of each span's part of [start, end)."""
        for i in range(max(bisect_right(self._starts, start) - 1, 0), len(self.spans)):
            span = self.spans[i]
            if span.start >= end:
                return
            if span.end > start:
                yield span.label, min(end, span.end) - max(start, span.start)


class Host:
    """Finds the phase, loop and kind of block of a moment in a thread of the host."""

    def __init__(self, events: Sequence[Event], main: Any) -> None:
        self._main = main
        ranges = [event for event in events if event.category == "user_annotation" and event.thread == main]
        self.phases = _Spans(_matching(ranges, _PHASE, "phase"))
        self._loops = _Spans(_matching(ranges, _LOOP, "loop"))
        self._kinds = _Spans(_matching(ranges, _BLOCK, "kind"))
        self._backward = self._backward_nodes(events)
        self._forward_of = self._forward_times(events)

    def _backward_nodes(self, events: Sequence[Event]) -> dict[Any, _Spans]:
        """Per thread, the nodes that autograd evaluates; the label is the sequence number, "" for none."""
        nodes: dict[Any, list[Span]] = defaultdict(list)
        names: dict[Any, str] = {}
        for event in events:  # an outer node comes before those that a checkpoint's own backward pass nests in it
            spans = nodes[event.thread]
            number = str(event.args.get("Sequence number", ""))
            is_inside = bool(spans) and event.start < spans[-1].end
            if event.name.startswith(_BACKWARD) and not is_inside:
                spans.append(Span(event.start, event.end, number))
                names[event.thread] = event.name.removeprefix(_BACKWARD)
            elif is_inside and not spans[-1].label and event.name == names[event.thread]:
                # What is written in Python, as are compiled blocks, has its number on a range inside of the node's.
                spans[-1] = spans[-1]._replace(label=number)
        return {thread: _Spans(spans) for thread, spans in nodes.items()}

    def _forward_times(self, events: Sequence[Event]) -> dict[str, float]:
        """When the forward operation of a sequence number ran in the main thread. Operations that make no node of
        the graph carry the number of the next that does, so the last one counts; recomputation does not."""
        times: dict[str, list[float]] = {}
        for event in events:
            number = event.args.get("Sequence number")
            if number is not None and event.category == "cpu_op" and event.thread == self._main:
                times.setdefault(str(number), []).append(event.start)
        return {
            number: forward[-1]
            for number, starts in times.items()
            if (forward := [start for start in starts if self._node_at(self._main, start) is None])
        }

    def _node_at(self, thread: Any, time: float) -> str | None:
        return self._backward[thread].at(time) if thread in self._backward else None

    def place(self, thread: Any, time: float) -> tuple[str, str, str]:
        """(phase, loop, kind); in a backward node the loop and kind are those of its forward operation."""
        phase = self.phases.at(time) or OUTSIDE
        node = self._node_at(thread, time)
        if node is not None:
            if node not in self._forward_of:
                return phase, OUTSIDE, OUTSIDE
            time = self._forward_of[node]
        elif thread != self._main:
            return phase, OUTSIDE, OUTSIDE
        return phase, self._loops.at(time) or OUTSIDE, self._kinds.at(time) or OUTSIDE


def _matching(events: Iterable[Event], pattern: re.Pattern[str], group: str) -> Iterable[Span]:
    for event in events:
        if match := pattern.fullmatch(event.name):
            yield Span(event.start, event.end, match[group])


def _launch_time(event: Event, launches: dict[Any, Event]) -> float:
    launch = launches.get(event.args.get("correlation"))
    return event.start if launch is None else launch.start


def _device_work(
    kernels: Sequence[Event], launches: dict[Any, Event], host: Host, start: float, end: float
) -> tuple[list[Work], list[tuple[float, float]]]:
    """Work on all streams and the gaps between; where n kernels overlap each gets 1/n of the time."""
    edges = sorted([(k.start, 1, i) for i, k in enumerate(kernels)] + [(k.end, 0, i) for i, k in enumerate(kernels)])
    shares = [0.0] * len(kernels)
    running: set[int] = set()
    gaps = []
    previous = start
    for time, begins, i in [*edges, (end, 0, -1)]:
        if running:
            for other in running:
                shares[other] += (time - previous) / len(running)
        elif time > previous:
            gaps.append((previous, time))
        previous = time
        if begins:
            running.add(i)
        else:
            running.discard(i)
    work = []
    for kernel, share in zip(kernels, shares, strict=True):
        launch = launches.get(kernel.args.get("correlation"))
        place = (OUTSIDE, OUTSIDE, OUTSIDE) if launch is None else host.place(launch.thread, launch.start)
        work.append(Work(kernel.name, share, *place))
    return work, gaps


def _main_thread_work(
    operations: Sequence[Event], host: Host, start: float, end: float
) -> tuple[list[Work], list[tuple[float, float]]]:
    """Operations without those that they call, and the gaps between."""
    own = [event.end - event.start for event in operations]
    gaps = []
    stack: list[int] = []
    previous = start
    for i, event in enumerate(operations):
        while stack and operations[stack[-1]].end <= event.start:
            stack.pop()
        if stack:
            own[stack[-1]] -= event.end - event.start
        else:
            if event.start > previous:
                gaps.append((previous, event.start))
            previous = max(previous, event.end)
        stack.append(i)
    if end > previous:
        gaps.append((previous, end))
    places = [host.place(event.thread, event.start) for event in operations]
    return [Work(e.name, t, *place) for e, t, place in zip(operations, own, places, strict=True)], gaps


def _add_up(
    work: Sequence[Work],
    gaps: Sequence[tuple[float, float]],
    host: Host,
    *,
    device: str,
    n_steps: int,
    duration: float,
) -> Summary:
    unit = 1 / (1000 * n_steps)  # us in all steps -> ms per step
    phases: dict[str, Share] = defaultdict(Share, {span.label: Share() for span in host.phases.spans})
    loops: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    operations: dict[str, Operation] = defaultdict(Operation)
    for item in work:
        time = item.time * unit
        phases[item.phase].busy += time
        loops[item.loop][item.phase] += time
        kinds[item.kind][item.phase] += time
        operations[item.name].time += time
        operations[item.name].calls += 1 / n_steps
    for start, end in gaps:
        rest = end - start
        for label, time in host.phases.overlaps(start, end):
            phases[label].idle += time * unit
            rest -= time
        phases[OUTSIDE].idle += rest * unit
    step = duration * unit
    outside = phases.pop(OUTSIDE, Share())
    phases[OUTSIDE] = outside  # last
    return Summary(
        device=device,
        n_steps=n_steps,
        step=step,
        busy=sum(item.time for item in work) * unit,
        idle=sum(end - start for start, end in gaps) * unit,
        accounted=1 - (outside.busy + outside.idle) / step,
        phases=dict(phases),
        loops={loop: dict(loops[loop]) for loop in sorted(loops, key=lambda loop: (loop == OUTSIDE, len(loop), loop))},
        kinds={kind: dict(kinds[kind]) for kind in sorted(kinds, key=lambda label: (label == OUTSIDE, label))},
        operations=dict(sorted(operations.items(), key=lambda entry: -entry[1].time)),
    )


def render(summary: Summary, top: int = 20) -> str:
    """The summary as text, with the ``top`` longest kernels or operations."""
    who = "device" if summary.device == "gpu" else "main thread"
    what = "kernel" if summary.device == "gpu" else "operation (without those it calls)"

    def share(time: float) -> str:
        return f"{time:12.3f}  {100 * time / summary.step:5.1f} %"

    lines = [
        f"{summary.n_steps} step(s) of {summary.step:.3f} ms; times in ms per step and % of the step",
        f"{who} busy {share(summary.busy)}",
        f"{who} idle {share(summary.idle)}",
        f"{100 * summary.accounted:.1f} % of the step lies in a named phase",
        "",
        f"{'phase':24}{'busy':>12}{'':9}{'idle':>12}",
    ]
    lines += [f"{name:24}{share(part.busy)}{share(part.idle)}" for name, part in summary.phases.items()]
    for title, groups in (("loop", summary.loops), ("block", summary.kinds)):
        columns = ["forward", "backward", "other phases"]
        lines += ["", f"{title:24}" + "".join(f"{name:>21}" for name in columns)]
        for label, times in groups.items():
            row = [times.get(name, 0.0) for name in columns[:-1]]
            row.append(sum(times.values()) - sum(row))
            lines.append(f"{label:24}" + "".join(f" {share(time)}" for time in row))
    lines += ["", f"{'':12}{'':9}{'calls':>10}  {what}"]
    lines += [
        f"{share(operation.time)}{operation.calls:>11.4g}  {name if len(name) <= 120 else name[:117] + '...'}"
        for name, operation in list(summary.operations.items())[:top]
    ]
    return "\n".join(lines) + "\n"
