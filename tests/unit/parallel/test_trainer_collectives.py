"""How often the trainer's own step gathers and reduces, which neither losses nor gradients show."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from counted_collectives import collectives

from lt2titan.config.loader import load_config
from lt2titan.trainer import Trainer

TINY = Path(__file__).parents[2] / "assets" / "tiny.toml"
N_LAYERS = 3
GROUPS = N_LAYERS + 1  # the blocks, and everything else


def travels(*overrides: str) -> tuple[int, int]:
    """(all-gathers, reduce-scatters) of the second step of a run of two ranks; it has no others than FSDP2's."""
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
            batches = iter(trainer.train_loader)
            steps = [[next(batches) for _ in range(trainer.n_microbatches)] for _ in range(2)]
            trainer.train_step(steps[0])
            counted = collectives(lambda: trainer.train_step(steps[1]))
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


def sizes(n_loops: int, n_microbatches: int) -> list[str]:
    own = ["--training.local_batch_size", "1", "--training.global_batch_size", str(2 * n_microbatches)]
    return ["--model.n_loops", str(n_loops), "--parallelism.fsdp_loop_reshard", "per_step", *own]


def _start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    a_step_gathers_once()
    deferred_reductions_are_few()
    dist.barrier()
    os._exit(0)  # as lt2titan.train leaves: tearing down races with gloo's threads


def test_two_ranks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, args=(folder,), nprocs=2)  # type: ignore[no-untyped-call]
