"""How often the trainer's own step gathers and reduces, and in which precision, which losses do not show."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from counted_collectives import collectives, dtypes_that_travel
from torch.distributed.tensor import DTensor

from lt2titan.config.loader import load_config
from lt2titan.trainer import Trainer

TINY = Path(__file__).parents[2] / "assets" / "tiny.toml"
N_LAYERS = 3
GROUPS = N_LAYERS + 1  # the blocks, and everything else


@contextmanager
def trained(*overrides: str) -> Iterator[Trainer]:
    """Of softmax attention only, on two ranks; a step has no other collectives than FSDP2's and a few all-reduces."""
    quiet = [
        "--model.mixer",
        "full",
        "--model.hybrid.mixer",
        "",
        "--checkpoint.no_enable",
        "--validation.no_enable",
        "--metrics.no_loop_diagnostics",
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(TINY, ["--job.dump_folder", folder, *quiet, *overrides], 2)
        with Trainer(config, torch.device("cpu")) as trainer:
            yield trainer


def steps(trainer: Trainer, n: int) -> list[list[Any]]:
    """Microbatches of the first ``n`` steps."""
    batches = iter(trainer.train_loader)
    return [[next(batches) for _ in range(trainer.n_microbatches)] for _ in range(n)]


def travels(*overrides: str) -> tuple[int, int]:
    """(all-gathers, reduce-scatters) of the second step."""
    with trained(*overrides) as trainer:
        first, second = steps(trainer, 2)
        trainer.train_step(first)
        counted = collectives(lambda: trainer.train_step(second))
    return counted["gather"], counted["reduce_scatter"]


def a_step_gathers_once() -> None:
    for n_loops, n_microbatches in ((1, 1), (2, 4), (4, 1), (8, 1)):
        found = travels(*sizes(n_loops, n_microbatches), "--parallelism.fsdp_defer_reductions", "off")
        assert found == (GROUPS, GROUPS * n_microbatches), (n_loops, n_microbatches, found)


def deferred_reductions_are_few() -> None:
    """What earlier microbatches left of a block is reduced in its first visit, the rest in its last."""
    for n_loops, mode, n_reductions in ((1, "none", GROUPS), (4, "nested", GROUPS + N_LAYERS)):
        options = ["--parallelism.fsdp_defer_reductions", "on", "--activation_checkpoint.mode", mode]
        found = travels(*sizes(n_loops, 4), *options)
        assert found == (GROUPS, n_reductions), (n_loops, mode, found)


def master_weights_are_in_fp32() -> None:
    """bfloat16 parameters are gathered, fp32 gradients reduced; what is sharded is fp32 before, during and after."""
    kept: dict[str, set[torch.dtype]] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(isinstance(p, DTensor) and isinstance(p.grad, DTensor) for p in parameters)
        kept["parameters"] = {p.to_local().dtype for p in parameters}
        kept["gradients"] = {p.grad.to_local().dtype for p in parameters}

    for n_microbatches, defers in ((1, "off"), (2, "on")):
        options = ["--training.mixed_precision_param", "bfloat16", "--parallelism.fsdp_defer_reductions", defers]
        with trained(*sizes(2, n_microbatches), *options) as trainer:
            (microbatches,) = steps(trainer, 1)
            trainer.optimizer.register_step_pre_hook(keep)
            found = dtypes_that_travel(lambda trainer=trainer, own=microbatches: trainer.train_step(own))  # type: ignore[misc]
            moments = {state["exp_avg"].to_local().dtype for state in trainer.optimizer.state.values()}
        assert found == {"gather": {"c10::BFloat16"}, "reduce_scatter": {"float"}}, found
        assert kept == {"parameters": {torch.float32}, "gradients": {torch.float32}}, kept
        assert moments == {torch.float32}


def sizes(n_loops: int, n_microbatches: int) -> list[str]:
    own = ["--training.local_batch_size", "1", "--training.global_batch_size", str(2 * n_microbatches)]
    return ["--model.n_loops", str(n_loops), "--parallelism.fsdp_loop_reshard", "per_step", *own]


def _start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    a_step_gathers_once()
    deferred_reductions_are_few()
    master_weights_are_in_fp32()
    dist.barrier()
    os._exit(0)  # as lt2titan.train leaves: tearing down races with gloo's threads


def test_two_ranks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, args=(folder,), nprocs=2)  # type: ignore[no-untyped-call]
