"""Summaries of hand-made traces, whose answers can be counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lt2titan.metrics.trace_summary import Operation, Share, Summary, TraceError, read_trace, render, summarize

MAIN, AUTOGRAD, HOST, DEVICE = 1, 2, 100, 0


def event(category: str, name: str, start: float, end: float, tid: int = MAIN, **args: Any) -> dict[str, Any]:
    pid = DEVICE if category in ("kernel", "gpu_memcpy", "gpu_memset") else HOST
    times = {"ts": 1e9 + start, "dur": end - start}
    return {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, "args": args, **times}


def launched(name: str, number: int, launch: float, start: float, end: float, **where: Any) -> list[dict[str, Any]]:
    """A kernel and its launch; ``where``: stream, and tid of the launching thread, and category."""
    category = where.get("category", "kernel")
    return [
        event("cuda_runtime", "cudaLaunchKernel", launch, launch + 1, where.get("tid", MAIN), correlation=number),
        event(category, name, start, end, where.get("stream", 7), correlation=number),
    ]


def annotations() -> list[dict[str, Any]]:
    return [
        event("user_annotation", "ProfilerStep#4", 0, 1000),
        event("user_annotation", "phase forward", 10, 400),
        event("user_annotation", "loop 1", 100, 200),
        event("user_annotation", "loop 1 block 0 gdn", 100, 150),
        event("user_annotation", "loop 1 block 1 full", 150, 190),
        event("user_annotation", "loop 2", 200, 300),
        event("user_annotation", "loop 2 block 0 gdn", 200, 250),
        event("user_annotation", "phase backward", 400, 800),
        event("user_annotation", "phase optimizer", 800, 990),
    ]


def gpu_trace() -> list[dict[str, Any]]:
    return [
        *annotations(),
        # Of sequence number 5 the later operation makes the node.
        event("cpu_op", "aten::peek", 110, 112, **{"Sequence number": 5}),
        event("cpu_op", "aten::mm", 160, 170, **{"Sequence number": 5}),
        event("cpu_op", "aten::mm", 210, 220, **{"Sequence number": 6}),
        event(
            "cpu_op", "autograd::engine::evaluate_function: MmBackward0", 410, 500, AUTOGRAD, **{"Sequence number": 6}
        ),
        # Computed again, in the autograd thread, with a number of that thread's own.
        event("cpu_op", "aten::mm", 420, 430, AUTOGRAD, **{"Sequence number": 5}),
        # A node written in Python: the number stands on the range within.
        event("cpu_op", "autograd::engine::evaluate_function: CompiledFunctionBackward", 500, 600, AUTOGRAD),
        event("cpu_op", "CompiledFunctionBackward", 505, 600, AUTOGRAD, **{"Sequence number": 5}),
        event("cpu_op", "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 600, 700, AUTOGRAD),
        *launched("early", 90, -50, -20, -10),  # of the step before
        *launched("embed", 1, 20, 50, 100),  # forward, outside of the loops
        *launched("mm", 2, 110, 110, 210),  # loop 1, gdn
        *launched("nccl", 3, 160, 160, 260, stream=9),  # loop 1, full: overlaps for 50
        *launched("mm", 4, 210, 300, 340),  # loop 2, gdn
        *launched("gate", 5, 260, 340, 350),  # loop 2, no block
        *launched("recompute", 6, 425, 430, 450, tid=AUTOGRAD),  # loop 2, gdn
        *launched("mm", 7, 510, 520, 620, tid=AUTOGRAD),  # loop 1, full
        *launched("add", 8, 610, 620, 640, tid=AUTOGRAD),  # backward, no loop
        *launched("Memset", 9, 810, 820, 830, category="gpu_memset"),
        *launched("adam", 10, 850, 1000, 1100),  # ends after the host has left the step
        *launched("next step", 11, 1050, 1100, 1200),
        event("kernel", "unlaunched", 900, 920, 7),
    ]


def write(path: Path, events: list[dict[str, Any]]) -> Path:
    content = json.dumps({"schemaVersion": 1, "traceEvents": events}).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def approx(times: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {label: pytest.approx(part) for label, part in times.items()}


def test_gpu_trace(tmp_path: Path) -> None:
    summary = summarize(read_trace(write(tmp_path / "t.json.gz", gpu_trace())))
    assert (summary.device, summary.n_steps) == ("gpu", 1)
    assert summary.step == pytest.approx(1.1)
    # Busy: 50..100, 110..260, 300..350, 430..450, 520..640, 820..830, 900..920, 1000..1100.
    assert summary.busy == pytest.approx(0.520) and summary.idle == pytest.approx(0.580)
    assert summary.idle_share == pytest.approx(0.58 / 1.1)
    assert {name: operation.time for name, operation in summary.operations.items()} == pytest.approx(
        {
            "mm": 0.075 + 0.040 + 0.100,
            "nccl": 0.075,
            "adam": 0.1,
            "embed": 0.05,
            "recompute": 0.02,
            "add": 0.02,
            "unlaunched": 0.02,
            "gate": 0.01,
            "Memset": 0.01,
        }
    )
    assert next(iter(summary.operations)) == "mm" and summary.operations["mm"].calls == 3
    assert summary.loops == approx(
        {
            "1": {"forward": 0.150, "backward": 0.100},
            "2": {"forward": 0.050, "backward": 0.020},
            "outside": {"forward": 0.050, "backward": 0.020, "optimizer": 0.110, "outside": 0.020},
        }
    )
    assert summary.kinds == approx(
        {
            "full": {"forward": 0.075, "backward": 0.100},
            "gdn": {"forward": 0.115, "backward": 0.020},
            "outside": {"forward": 0.060, "backward": 0.020, "optimizer": 0.110, "outside": 0.020},
        }
    )
    idle = {name: share.idle for name, share in summary.phases.items()}
    # forward 10..50, 100..110, 260..300, 350..400; backward 400..430, 450..520, 640..800;
    # optimizer 800..820, 830..900, 920..990; outside 0..10, 990..1000.
    assert idle == pytest.approx({"forward": 0.140, "backward": 0.260, "optimizer": 0.160, "outside": 0.020})
    busy = {name: share.busy for name, share in summary.phases.items()}
    assert busy == pytest.approx({"forward": 0.250, "backward": 0.140, "optimizer": 0.110, "outside": 0.020})
    assert summary.accounted == pytest.approx(1 - 0.04 / 1.1)


def test_cpu_trace_of_two_steps(tmp_path: Path) -> None:
    events = [
        event("user_annotation", "ProfilerStep#0", 0, 100),
        event("user_annotation", "ProfilerStep#1", 100, 200),
        event("user_annotation", "phase forward", 0, 95),
        event("user_annotation", "loop 1", 10, 90),
        event("user_annotation", "loop 1 block 0 kda", 10, 90),
        event("user_annotation", "phase backward", 100, 200),
        event("cpu_op", "aten::linear", 10, 50, **{"Sequence number": 1}),
        event("cpu_op", "aten::mm", 20, 45, **{"Sequence number": 2}),
        event("cpu_op", "aten::copy_", 25, 30),
        event("cpu_op", "aten::mm", 60, 70),
        event("cpu_op", "aten::other_thread", 0, 200, tid=5),
        event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 110, 190, **{"Sequence number": 2}),
        event("cpu_op", "aten::mm", 120, 160),
    ]
    summary = summarize(read_trace(write(tmp_path / "t.json", events)))
    assert (summary.device, summary.n_steps) == ("cpu", 2)
    assert summary.step == pytest.approx(0.1)
    expected = {
        "aten::mm": Operation(0.035, 1.5),  # 20 + 10 + 40 us in two steps
        "autograd::engine::evaluate_function: MmBackward0": Operation(0.020, 0.5),
        "aten::linear": Operation(0.0075, 0.5),
        "aten::copy_": Operation(0.0025, 0.5),
    }
    assert list(summary.operations) == list(expected)
    for name, operation in expected.items():
        assert summary.operations[name].time == pytest.approx(operation.time)
        assert summary.operations[name].calls == pytest.approx(operation.calls)
    assert summary.busy == pytest.approx(0.065) and summary.idle == pytest.approx(0.035)
    assert summary.phases["forward"].busy == pytest.approx(0.025)
    assert summary.phases["forward"].idle == pytest.approx(0.0225)  # 0..10, 50..60, 70..95
    assert summary.phases["outside"] == Share(0.0, pytest.approx(0.0025))  # 95..100
    assert summary.loops == approx({"1": {"forward": 0.025, "backward": 0.040}})
    assert summary.kinds == approx({"kda": {"forward": 0.025, "backward": 0.040}})


def test_text_names_every_part(tmp_path: Path) -> None:
    summary: Summary = summarize(read_trace(write(tmp_path / "t.json", gpu_trace())))
    lines = render(summary, top=2).splitlines()
    assert lines[0] == "1 step(s) of 1.100 ms; times in ms per step and % of the step"
    assert [line.split() for line in lines[1:4]] == [
        ["device", "busy", "0.520", "47.3", "%"],
        ["device", "idle", "0.580", "52.7", "%"],
        ["96.4", "%", "of", "the", "step", "lies", "in", "a", "named", "phase"],
    ]
    assert ["backward", "0.140", "12.7", "%", "0.260", "23.6", "%"] in [line.split() for line in lines]
    assert ["1", "0.150", "13.6", "%", "0.100", "9.1", "%", "0.000", "0.0", "%"] in [line.split() for line in lines]
    assert [line.split()[-1] for line in lines[-2:]] == ["mm", "adam"]


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"missing.json: cannot be read: No such file"):
        read_trace(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(TraceError, match=r"bad.json: is not JSON"):
        read_trace(tmp_path / "bad.json")
    (tmp_path / "torn.json.gz").write_bytes(gzip.compress(b"{}" * 1000)[:-12])
    with pytest.raises(TraceError, match=r"torn.json.gz: is not JSON"):
        read_trace(tmp_path / "torn.json.gz")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(TraceError, match="no traceEvents"):
        read_trace(tmp_path / "list.json")
    with pytest.raises(TraceError, match="no ProfilerStep#"):
        read_trace(write(tmp_path / "other.json", [event("cpu_op", "aten::mm", 0, 1)]))
