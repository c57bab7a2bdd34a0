"""Ranges of loops and blocks in real traces, and that naming them changes nothing."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.profiler import ProfilerActivity, profile

from lt2titan.metrics.config import ProfilingConfig
from lt2titan.metrics.loop_statistics import LoopStatistics
from lt2titan.metrics.profile_ranges import LoopRanges, phase
from lt2titan.metrics.profiler import maybe_profile
from lt2titan.metrics.trace_summary import Host, read_trace, render, summarize
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, MixersConfig, WindowConfig
from lt2titan.parallel.activation_checkpoint import apply_activation_checkpoint

CPU = torch.device("cpu")
MIXERS = MixersConfig(full=FullConfig(n_heads=2), window=WindowConfig(n_heads=2, window=4))
CONFIG = ModelConfig(
    vocab_size=19,
    dim=16,
    n_layers=3,
    n_loops=3,
    ffn_dim=16,
    mixer="window",
    hybrid=HybridConfig(mixer="full", ratio=2),
    mixers=MIXERS,
)
BLOCKS = ["window", "window", "full"]


def build() -> LT2:
    model = build_on_meta(CONFIG, "reference")
    materialise(model, CPU, seed=1)
    return model


def tokens() -> Tensor:
    return torch.arange(24).remainder(19).view(2, 12)


def step(model: LT2, **arguments: Any) -> dict[str, Tensor]:
    """Loss and gradients."""
    with phase("forward"):
        loss = model(tokens(), targets=tokens(), **arguments)
    with phase("backward"):
        loss.backward()
    with phase("optimizer"):
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    return {"loss": loss.detach(), **gradients}


@contextmanager
def ranges(model: LT2) -> Iterator[None]:
    named = LoopRanges(model)
    try:
        yield
    finally:
        named.detach()


def names_of(work: Callable[[], Any]) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    return [event.name for event in profiler.events() if event.name.startswith("loop ")]


def expected_names(n_loops: int) -> list[str]:
    return [
        name
        for loop in range(1, n_loops + 1)
        for name in (f"loop {loop}", *(f"loop {loop} block {i} {kind}" for i, kind in enumerate(BLOCKS)))
    ]


@pytest.mark.parametrize("mode", ["none", "block"])
def test_every_visit_is_named_once_and_nothing_changes(mode: str) -> None:
    model = build()
    apply_activation_checkpoint(model, mode)
    plain = step(model)
    with ranges(model):
        assert names_of(lambda: step(model)) == expected_names(3)
        assert names_of(lambda: step(model, n_loops=2)) == expected_names(2)
        named = step(model)
    assert named.keys() == plain.keys()
    assert all(torch.equal(named[name], plain[name]) for name in plain)
    assert names_of(lambda: step(model)) == []


def test_an_observer_sees_the_same() -> None:
    model = build()

    def figures() -> dict[str, float]:
        statistics = LoopStatistics(3, CPU)
        with model.core.observed_by(statistics):
            step(model)
        return statistics.figures()

    plain = figures()
    with ranges(model):
        assert figures() == plain
    assert model.core.observer is None


def test_an_error_closes_its_ranges() -> None:
    model = build()
    broken = model.core.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)

    def fail() -> None:
        with pytest.raises(ZeroDivisionError), ranges(model):
            step(model)
        broken.remove()
        with ranges(model):
            step(model)

    assert names_of(fail) == ["loop 1", "loop 1 block 0 window", "loop 1 block 1 window", *expected_names(3)]
    assert model.core.observer is None


def test_compiled_blocks_are_not_compiled_again() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    model = build()
    for block in model.core.blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    plain, n_graphs = step(model), len(graphs)
    assert n_graphs > 0
    with ranges(model):
        assert names_of(lambda: step(model)) == expected_names(3)
        named = step(model)
    assert all(torch.equal(named[name], plain[name]) for name in plain)
    step(model)
    assert len(graphs) == n_graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("mode, is_compiled", [("none", False), ("block", False), ("none", True), ("block", True)])
def test_summary_of_a_real_trace(tmp_path: Path, mode: str, is_compiled: bool) -> None:
    torch._dynamo.reset()
    model = build()
    apply_activation_checkpoint(model, mode)
    for block in model.core.blocks if is_compiled else []:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    config = ProfilingConfig(enable_profiling=True, profile_freq=4, profiler_active=2, profiler_warmup=1)
    with maybe_profile(config, tmp_path, rank=0, model=model) as profiler:
        for _ in range(4):
            step(model)
            profiler.step()
    folder = tmp_path / "profile_traces" / "iteration_4"
    events = read_trace(folder / "rank0_trace.json.gz")
    summary = summarize(events)
    assert (folder / "rank0_summary.txt").read_text() == render(summary)

    assert summary.device == "cpu" and summary.n_steps == 2
    assert summary.busy + summary.idle == pytest.approx(summary.step)
    assert sum(operation.time for operation in summary.operations.values()) == pytest.approx(summary.busy)
    assert sum(sum(times.values()) for times in summary.loops.values()) == pytest.approx(summary.busy)
    outside = summary.phases["outside"]
    assert summary.accounted == pytest.approx(1 - (outside.busy + outside.idle) / summary.step)
    assert sum(part.busy + part.idle for part in summary.phases.values()) == pytest.approx(summary.step)
    assert list(summary.loops) == ["1", "2", "3", "outside"] and list(summary.kinds) == ["full", "window", "outside"]
    for times in [*summary.loops.values(), *summary.kinds.values()]:
        assert times["forward"] > 0 and times["backward"] > 0
    backward = summary.phases["backward"].busy
    assert summary.loops["outside"]["backward"] < backward / 2 and summary.kinds["outside"]["backward"] < backward / 2

    # torch draws its own arrows from forward to backward operations: both ends belong to the same loop and kind.
    raw = json.loads(gzip.decompress((folder / "rank0_trace.json.gz").read_bytes()))["traceEvents"]
    arrows = {end: {e["id"]: e for e in raw if e.get("cat") == "fwdbwd" and e["ph"] == end} for end in "sf"}
    thread = next(event.thread for event in events if event.name.startswith("ProfilerStep#"))
    host = Host(events, thread)
    # By operations: of so short steps the profiler's own work, between phases, takes a part that varies.
    operations = [event for event in events if event.category == "cpu_op" and event.thread == thread]
    phases = Counter(host.place(thread, operation.start)[0] for operation in operations)
    assert phases["outside"] < 0.01 * phases.total()
    seen: Counter[tuple[str, str]] = Counter()
    for number, arrow in arrows["s"].items():
        forward = host.place((arrow["pid"], arrow["tid"]), arrow["ts"])
        end = arrows["f"][number]
        backward = host.place((end["pid"], end["tid"]), end["ts"])
        if forward[0] == "forward":  # not an operation that was computed again
            assert backward == ("backward", *forward[1:])
            seen[backward[1:]] += 1
    assert seen.keys() >= {(str(loop), kind) for loop in (1, 2, 3) for kind in ("window", "full")}
    assert len({count for (loop, kind), count in seen.items() if kind == "full"}) == 1  # the same in every loop
