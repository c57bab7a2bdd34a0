"""Snapshots of CUDA memory: what they hold is what the steps before them allocated."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from lt2titan.metrics.config import ProfilingConfig
from lt2titan.metrics.profiler import maybe_profile
from lt2titan.model.head import CHUNK, loss_sum

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
MIB = 2**20
OPTIONS = ProfilingConfig(enable_memory_snapshot=True, profile_freq=2)


def snapshot(dump_folder: Path, name: str) -> Any:
    return pickle.loads((dump_folder / f"memory_snapshots/{name}/rank0_memory_snapshot.pickle").read_bytes())


def events(taken: Any, action: str) -> list[Any]:
    return [event for device in taken["device_traces"] for event in device if event["action"] == action]


def held(taken: Any) -> list[int]:
    """Bytes of the tensors that were alive, as they were asked for."""
    blocks = [block for segment in taken["segments"] for block in segment["blocks"]]
    return [block["requested_size"] for block in blocks if block["state"] == "active_allocated"]


def test_a_snapshot_shows_what_steps_allocated_and_where(tmp_path: Path) -> None:
    kept = []
    with maybe_profile(OPTIONS, tmp_path, rank=0, device=CUDA) as profiler:
        for step in (1, 2, 3, 4, 5):
            kept.append(torch.empty(step * MIB, dtype=torch.uint8, device=CUDA))
            torch.empty(100 * MIB + step, dtype=torch.uint8, device=CUDA)  # freed at once
            profiler.step()
    assert sorted(path.name for path in (tmp_path / "memory_snapshots").iterdir()) == ["iteration_2", "iteration_4"]
    for last in (2, 4):
        taken = snapshot(tmp_path, f"iteration_{last}")
        sizes = held(taken)
        assert all((step * MIB in sizes) == (step <= last) for step in (1, 2, 3, 4, 5)), sizes
        assert not any(100 * MIB + step in sizes for step in (1, 2, 3, 4, 5)), sizes
        for action in ("alloc", "free_completed"):
            found = [event for event in events(taken, action) if event["size"] > 100 * MIB]
            assert len(found) == last, (action, found)
        here = events(taken, "alloc")[-1]["frames"]
        assert any(frame["filename"].endswith("test_profiler_cuda.py") for frame in here), here


def test_a_snapshot_is_written_when_memory_runs_out(tmp_path: Path) -> None:
    with (
        pytest.raises(torch.OutOfMemoryError),
        maybe_profile(OPTIONS, tmp_path, rank=0, device=CUDA) as profiler,
    ):
        profiler.step()
        kept = torch.empty(3 * MIB, dtype=torch.uint8, device=CUDA)
        torch.empty(2**50, dtype=torch.uint8, device=CUDA)
    taken = snapshot(tmp_path, "iteration_2_out_of_memory")
    assert kept.numel() in held(taken)
    assert [event["size"] for event in events(taken, "oom")] == [2**50]


def test_recomputation_goes_on_while_memory_is_recorded(tmp_path: Path) -> None:
    """Its early end is an exception that torch's recording loses."""
    generator = torch.Generator(CUDA).manual_seed(0)
    hidden = torch.randn(2 * CHUNK, 64, device=CUDA, generator=generator, requires_grad=True)
    weight = torch.randn(4096, 64, device=CUDA, generator=generator, requires_grad=True)
    targets = torch.randint(0, 4096, (2 * CHUNK,), device=CUDA, generator=generator)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss_sum(hidden, weight, targets), (hidden, weight))

    expected = gradients()
    with maybe_profile(OPTIONS, tmp_path, rank=0, device=CUDA):
        got = gradients()
    for value, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(value, truth)
