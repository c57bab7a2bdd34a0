"""Models split by heads over processes against one whole model: values, losses, gradients of every mixer."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from counted_collectives import collectives
from split_models import (
    CPU,
    FOUR_HEADS,
    LENGTH,
    MIXERS,
    ONE_GROUP,
    ONE_KEY_HEAD,
    THREE_KEY_HEADS,
    TWO_KEY_HEADS,
    batches,
    check_evaluated,
    check_same,
    config,
    in_turn,
    loss_of,
    own_part,
    relative_error,
    rows,
    run,
    split_model,
    whole_model,
)

from lt2titan.config.job import JobConfig
from lt2titan.config.section import ConfigError
from lt2titan.evaluation.loop_diagnostics import validation_diagnostics
from lt2titan.kernels.dsa import dsa_select
from lt2titan.metrics.loop_statistics import LoopStatistics
from lt2titan.model.config import ModelConfig
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers import dsa
from lt2titan.model.mixers.config import GDNConfig, Mamba2Config, MixersConfig
from lt2titan.model.state import allocate
from lt2titan.optim.config import OptimizerConfig
from lt2titan.optim.optimizer import build_optimizer
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.config.tensor_parallel import check_tensor_parallel
from lt2titan.parallel.fsdp import reshard, set_gradient_sync
from lt2titan.parallel.mesh import ParallelDims


def mesh(tensor: int) -> ParallelDims:
    return ParallelDims.build(ParallelismConfig(tensor_parallel_degree=tensor), "cpu")


def every_mixer() -> None:
    dims = mesh(2)
    for name in MixersConfig.names():
        check_same(config(name), dims, packed=True)
    check_same(config("mamba2", mixers=ONE_GROUP), dims)
    check_same(config("nsa", mixers=TWO_KEY_HEADS), dims, packed=True)
    check_same(config("gdn", "dsa"), dims, options={"sees_all": True})
    check_same(config("dsa", mixers=ONE_KEY_HEAD), dims, packed=True)
    check_same(config("dsa", mixers=ONE_KEY_HEAD), dims, options={"sees_all": True})
    check_same(replace(config("dsa", mixers=THREE_KEY_HEADS), dim=24), dims, packed=True)


def without_sequence_parallelism() -> None:
    dims = mesh(2)
    check_same(config("gdn", "full", tied=False), dims, sequence_parallel=False, packed=True)
    check_same(config("mamba2", "rwkv7", mixers=ONE_GROUP), dims, sequence_parallel=False)
    check_same(config("gdn", "dsa"), dims, sequence_parallel=False, packed=True)
    check_same(config("gdn", "dsa", mixers=ONE_KEY_HEAD), dims, sequence_parallel=False, packed=True)


def several_steps() -> None:
    check_same(config("gdn", "full", tied=False), mesh(2), n_steps=4)


def losses_in_fp32() -> None:
    torch.set_default_dtype(torch.float32)
    shape, dims = config("gdn", "full"), mesh(2)
    models = [whole_model(shape), split_model(shape, dims, True)]
    optimizers = [build_optimizer(model, OptimizerConfig(lr=1e-3)) for model in models]
    for step in range(4):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            losses.append(loss_of(model, batches(step, packed=True)))
            losses[-1].backward()
            if model is models[1]:
                reshard(model)
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.set_default_dtype(torch.float64)


def recompute_and_fewer_loops() -> None:
    dims = mesh(2)
    check_same(config("rwkv7"), dims, activation_checkpoint="block")
    check_same(config("gdn", "window"), dims, options={"n_loops": 2, "n_backward_loops": 1})


def diagnosed_and_observed_alike() -> None:
    dims, text = mesh(2), batches(0, packed=False)
    # Of every loop; of all but the first the overlap with the one before.
    shapes = (
        (config("gdn", "full"), 3 * 5),
        (config("nsa"), 3 * 6 - 1),
        (config("nsa", mixers=TWO_KEY_HEADS), 17),
        (config("gdn", "dsa"), 17),
        (replace(config("gdn", "dsa", mixers=THREE_KEY_HEADS), dim=24), 17),
    )
    for shape, n_figures in shapes:
        one, split = whole_model(shape), split_model(shape, dims, True)
        figures = [validation_diagnostics(model, text, CPU) for model in (split, one)]
        statistics = [LoopStatistics(3, CPU) for _ in figures]
        for model, observer in zip((split, one), statistics, strict=True):
            with model.core.observed_by(observer):
                loss_of(model, text)
        split_figures, expected = (a | b.figures() for a, b in zip(figures, statistics, strict=True))
        assert len(expected) == n_figures
        assert split_figures == pytest.approx(expected, rel=1e-10)


def selections_are_the_same() -> None:
    """Not by luck of equal results: every rank chooses the keys that the whole model chooses, in every visit."""
    shape, dims = config("dsa"), mesh(2)

    def chosen(model: LT2) -> list[torch.Tensor]:
        selections: list[torch.Tensor] = []

        def spy(*args: Any, **options: Any) -> torch.Tensor:
            selections.append(dsa_select(*args, **options))
            return selections[-1]

        with patch.object(dsa, "dsa_select", spy):
            loss_of(model, batches(0, packed=True))
        return selections

    everywhere: list[list[torch.Tensor]] = [[], []]
    dist.all_gather_object(everywhere, chosen(split_model(shape, dims, True)))
    expected = chosen(whole_model(shape))
    assert len(expected) > 1 and any((selection >= 0).any() for selection in expected)
    for selections in everywhere:
        assert all(torch.equal(a, b) for a, b in zip(selections, expected, strict=True))


def sums_of_gradients_do_not_grow_with_loops() -> None:
    """What is whole on every rank has its gradient summed once per backward pass."""
    dims, counts = mesh(2), []
    for n_loops in (1, 3):
        split = split_model(config("gdn"), dims, True)
        loss_of(split, batches(0, packed=False)[:1], n_loops=n_loops).backward()  # whatever is made at first
        loss = partial(loss_of, split, batches(0, packed=False)[:1], n_loops=n_loops)
        counts.append(collectives(lambda loss=loss: loss().backward()))  # type: ignore[misc]
    sums, gathers = ([count[kind] for count in counts] for kind in ("all_reduce", "gather"))
    # Three norm gains and a head norm per block, rho, the final norm; the maximum and the sum of the loss.
    assert sums[0] == sums[1] == 2 * 3 + 2 + 2, counts
    assert gathers[1] > 2 * gathers[0], counts  # the residual stream's do


def evaluated_alike() -> None:
    check_evaluated(config("gdn", "full"), mesh(2))


def refused() -> None:
    split = split_model(config("gdn"), mesh(2), True)
    with pytest.raises(ValueError, match="does not decode"):
        allocate(split, 1, 8, torch.float64, CPU)


def logits_are_whole_and_odd_lengths_refused() -> None:
    dims, shape = mesh(2), config("gdn", "full")
    one, split = whole_model(shape), split_model(shape, dims, True)
    tokens = rows(0)[:, :LENGTH]
    with torch.no_grad():
        torch.testing.assert_close(split(tokens), one(tokens))
        with pytest.raises(ValueError, match="sequence_parallel = false"):
            split(rows(0))
    loose = split_model(shape, dims, False)
    with torch.no_grad():
        torch.testing.assert_close(loose(rows(0)), one(rows(0)))


def with_fsdp() -> None:
    """Shards of shares: two heads of two ranks each leave one of two FSDP ranks without any A_log; and of weights that
    tensor-parallel ranks have whole."""
    dims, shape = mesh(2), config("gdn", "dsa", mixers=replace(ONE_KEY_HEAD, gdn=GDNConfig(n_heads=2)))
    check_same(shape, dims, n_steps=2)
    split, one = split_model(shape, dims, True), whole_model(shape)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.save({"model": split.state_dict()}, checkpoint_id=folder[0])
    loaded = {name: torch.zeros_like(tensor) for name, tensor in one.state_dict().items()}
    dcp.load({"model": loaded}, checkpoint_id=folder[0], no_dist=True)
    for name, tensor in one.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


def with_other_layouts() -> None:
    dims = mesh(2)
    check_same(config("rwkv7", tied=False), dims, packed=True, sequence_parallel=False)
    check_same(config("gdn", "full"), dims, loop_reshard="per_visit", n_steps=2)
    check_same(config("kda"), dims, loop_reshard="per_pass", activation_checkpoint="block")
    replicas = ParallelismConfig(data_parallel_replicate_degree=2, tensor_parallel_degree=2)
    check_same(config("mamba2", "full"), ParallelDims.build(replicas, "cpu"), packed=True, n_steps=2)


def deferred_reductions() -> None:
    """Partial gradients of several microbatches are added up before they are summed over ranks."""
    dims, shape = mesh(2), config("gdn", "gla")
    one, split = whole_model(shape), split_model(shape, dims, True)
    for step in range(3):
        loss_of(one, batches(step, packed=False)).backward()
        set_gradient_sync(split, step == 2)
        loss_of(split, own_part(batches(step, packed=False), dims)).backward()
    reshard(split)
    expected = dict(one.named_parameters())
    errors = {name: relative_error(p.grad, expected[name].grad) for name, p in split.named_parameters()}
    assert max(errors.values()) < 1e-10, errors


def compiled() -> None:
    """The mixers that communicate or slice by rank inside of their graphs."""
    dims = mesh(2)
    for name in ("rwkv7", "mamba2", "retnet", "nsa"):
        check_same(config(name, "full", mixers=ONE_GROUP), dims, compile_backend="aot_eager", packed=True)
    check_same(config("dsa", mixers=ONE_KEY_HEAD), dims, compile_backend="aot_eager", packed=True)
    check_same(config("hgrn2", "full"), dims, compile_backend="aot_eager", sequence_parallel=False)


def four_shares() -> None:
    for name in ("gdn", "full", "hgrn2", "retnet", "mamba2", "nsa", "dsa"):
        check_same(config(name, mixers=FOUR_HEADS), mesh(4), packed=True)


def test_two_ranks_against_one() -> None:
    # One start of two processes for all of them.
    works = [
        every_mixer,
        without_sequence_parallelism,
        several_steps,
        losses_in_fp32,
        recompute_and_fewer_loops,
        logits_are_whole_and_odd_lengths_refused,
        diagnosed_and_observed_alike,
        selections_are_the_same,
        evaluated_alike,
        sums_of_gradients_do_not_grow_with_loops,
        refused,
    ]
    run(2, partial(in_turn, works))


def test_tensor_parallel_with_fsdp_on_four_ranks() -> None:
    run(4, with_fsdp)


@pytest.mark.wide
def test_compiled_blocks() -> None:
    run(2, compiled)


@pytest.mark.wide
def test_four_ranks_in_other_layouts() -> None:
    run(4, partial(in_turn, [with_other_layouts, deferred_reductions, four_shares]))


@pytest.mark.parametrize(
    ("model", "degree", "message"),
    [
        (config("gdn", "full"), 4, r"model.mixers.gdn.n_heads = 2 .* evenly: \[1, 2\]"),
        (config("full"), 4, r"n_kv_heads = 2 \(the next that it splits is 4\)"),
        (config("nsa", mixers=TWO_KEY_HEADS), 4, r"mixers.nsa.n_kv_heads = 2 \(the next that it splits is 4\)"),
        (config("rwkv7"), 4, r"rwkv7 heads \(dim / head_dim\) = 2"),
        (replace(config("hgrn2"), vocab_size=19), 2, r"vocab_size = 19 \(the next that it splits is 20\)"),
        (replace(config("hgrn2"), ffn_dim=25), 2, "ffn_dim = 25"),
    ],
)
def test_uneven_sizes_are_refused(model: ModelConfig, degree: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_tensor_parallel(model, degree)


def test_a_run_is_refused_before_it_starts() -> None:
    job = JobConfig(model=config("gdn"), parallelism=ParallelismConfig(tensor_parallel_degree=4))
    job.training.dataset, job.validation.enable = "synthetic", False
    with pytest.raises(ConfigError, match=r"^parallelism.tensor_parallel_degree = 4: .*n_heads = 2"):
        job.validate_run(4)
    job.parallelism.tensor_parallel_degree = 2
    job.validate_run(2)
    job.training.seq_len = 33
    with pytest.raises(ConfigError, match=r"^parallelism.sequence_parallel = True: training.seq_len = 33"):
        job.validate_run(2)
    job.parallelism.sequence_parallel = False
    job.validate_run(2)


def test_groups_neither_split_nor_shared_are_refused() -> None:
    mixers = replace(MIXERS, mamba2=Mamba2Config(n_heads=12, n_groups=6, state_size=6))
    model = replace(config("mamba2", mixers=mixers), dim=24, ffn_dim=24)
    check_tensor_parallel(model, 2)
    with pytest.raises(ConfigError, match=r"n_groups = 6.* evenly: \[1, 2\]"):
        check_tensor_parallel(model, 4)
