"""Every sampled or growing schedule in the trainer's own loop, in this process: the loops that run, and resumption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import TINY, metrics

from lt2titan.config.loader import load_config
from lt2titan.model.loop_schedule import LoopSchedule
from lt2titan.parallel.compile import RecompileWatch
from lt2titan.trainer import Trainer

N_LOOPS, N_STEPS = 4, 6
# Softmax layers, which are quick to compile.
MODEL = ["--model.mixer", "full", "--model.hybrid.mixer", "", "--model.n_loops", str(N_LOOPS)]
VALIDATION = ["--validation.freq", "2", "--validation.local_batch_size", "2", "--validation.loops", "1", "4"]
COMPILED = ["--compile.enable", "--compile.backend", "aot_eager", "--compile.error_on_recompile"]
SCHEDULES = {
    "poisson_lognormal": ["--model.loop.mean_loops", "2.5"],
    "list": ["--model.loop.loops", "1", "2", "4"],
    "grow": ["--model.loop.grow_steps", "4", "--model.loop.backward_loops", "2", *COMPILED],
}


@pytest.fixture(autouse=True)
def _one_process(tmp_path: Path) -> Iterator[None]:
    torch._dynamo.reset()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    yield
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits
    dist.destroy_process_group()
    torch._C._dynamo.eval_frame._set_lru_cache(True)
    torch._dynamo.reset()


def train(folder: Path, *overrides: str) -> RecompileWatch | None:
    horizon = ["--training.steps", str(N_STEPS), "--lr_scheduler.total_steps", str(N_STEPS)]
    config = load_config(TINY, ["--job.dump_folder", str(folder), *MODEL, *VALIDATION, *horizon, *overrides], 1)
    with Trainer(config, torch.device("cpu")) as trainer:
        trainer.train()
        return trainer.recompiles


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_and_its_second_half_run_the_loops_of_the_schedule(name: str, tmp_path: Path) -> None:
    schedule = ["--model.loop.schedule", name, *SCHEDULES[name]]
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    watch = train(straight, *schedule)
    assert (watch is None) == (name != "grow")
    if watch is not None:
        # A block and the loss, with gradients and for validation; and the block in loops that gradients do not reach.
        assert (watch.n_warm_up_graphs, watch.n_recompiled) == (5, 0)
    config = load_config(TINY, [*MODEL, *schedule], 1)
    due = LoopSchedule(config.model.loop, N_LOOPS, config.debug.seed)
    records = metrics(straight)
    assert [r["loops"] for r in records] == [due.loops(step) for step in range(1, N_STEPS + 1)]
    assert len({r["loops"] for r in records}) > 2 and records[2]["loops"] != records[3]["loops"]
    for r in records:  # as the loops themselves tell
        ran = {key for key in r if key.startswith("residual_rms/")}
        assert ran == {f"residual_rms/loop_{t}" for t in range(1, r["loops"] + 1)}
    for r in metrics(straight, "validation_loss"):
        assert r["validation_loss/loops_4"] == r["validation_loss"] != r["validation_loss/loops_1"]

    train(halves, *schedule, "--training.steps", "3")
    assert [r["step"] for r in metrics(halves)] == [1, 2, 3]
    train(halves, *schedule)
    for key in ("step", "loops", "loss", "grad_norm", "lr"):
        assert [r[key] for r in metrics(halves)] == [r[key] for r in records], key
    (*_, resumed), (*_, expected) = metrics(halves, "validation_loss"), metrics(straight, "validation_loss")
    assert (resumed["step"], resumed["validation_loss"]) == (N_STEPS, expected["validation_loss"])
