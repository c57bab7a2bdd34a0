"""Sharded and replicated processes against one whole model: ten optimizer steps, gradients, and how often parameters
and gradients travel."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from counted_collectives import collectives, event_names
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from lt2titan.checkpoint.config import CheckpointConfig
from lt2titan.checkpoint.manager import CheckpointManager
from lt2titan.data.packing import Batch
from lt2titan.evaluation.loop_diagnostics import validation_diagnostics
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, GDNConfig, MixersConfig
from lt2titan.optim.clip import clip_grad_norm
from lt2titan.optim.config import OptimizerConfig
from lt2titan.optim.optimizer import build_optimizer
from lt2titan.parallel.communication_estimate import of_parameters
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.fsdp import kept_gathered, reshard, set_gradient_sync
from lt2titan.parallel.layout import Layout
from lt2titan.parallel.mesh import ParallelDims
from lt2titan.parallel.parallelize import parallelize

CPU = torch.device("cpu")
N_LAYERS = 2
GROUPS = N_LAYERS + 1  # one per block and one for the rest; an embedding that is not tied adds one
N_LOOPS, N_ROWS, N_STEPS = 3, 8, 10


class Case(NamedTuple):
    """A way to train on the same N_ROWS rows per step."""

    loop_reshard: str = "per_step"
    n_microbatches: int = 1
    defers: bool = False
    replicate: int = 1
    cpu_offload: bool = False
    is_tied: bool = True
    n_layers: int = N_LAYERS


def model_config(n_loops: int, is_tied: bool = True, n_layers: int = N_LAYERS) -> ModelConfig:
    # Rows of rho and odd widths: shards of unequal and of no size.
    return ModelConfig(
        vocab_size=37,
        dim=16,
        n_layers=n_layers,
        n_loops=n_loops,
        ffn_dim=20,
        tie_embeddings=is_tied,
        mixer="gdn",
        hybrid=HybridConfig(mixer="full", ratio=1) if n_layers > 1 else HybridConfig(),
        mixers=MixersConfig(full=FullConfig(n_heads=2), gdn=GDNConfig(n_heads=2)),
    )


def rows(step: int = 0) -> torch.Tensor:
    return torch.randint(0, 37, (N_ROWS, 9), generator=torch.Generator().manual_seed(step))


def loss_of(model: LT2, rows: torch.Tensor, **loops: int) -> torch.Tensor:
    return model(rows[:, :-1], targets=rows[:, 1:], **loops) / (N_ROWS * 8)


def whole_model(n_loops: int, is_tied: bool = True) -> LT2:
    model = build_on_meta(model_config(n_loops, is_tied), "reference")
    materialise(model, CPU, seed=3)
    return model


def sharded_model(n_loops: int, case: Case) -> LT2:
    model = build_on_meta(model_config(n_loops, case.is_tied, case.n_layers), "reference")
    dims = ParallelDims.build(ParallelismConfig(data_parallel_replicate_degree=case.replicate), "cpu")
    parallelize(
        model,
        dims,
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        activation_checkpoint="none",
        loop_reshard=case.loop_reshard,
        cpu_offload=case.cpu_offload,
    )
    materialise(model, CPU, seed=3, storage=CPU)
    return model


def backward(model: LT2, case: Case, step: int = 0, **loops: int) -> torch.Tensor:
    """This rank's share of a step's rows, as the trainer runs them; returns its loss."""
    total = torch.zeros(())
    mine = rows(step).chunk(dist.get_world_size())[dist.get_rank()]
    microbatches = mine.chunk(case.n_microbatches)
    assert len(microbatches) == case.n_microbatches
    for i, microbatch in enumerate(microbatches, start=1):
        if case.defers:
            set_gradient_sync(model, i == case.n_microbatches)
        loss = loss_of(model, microbatch, **loops)
        loss.backward()
        total += loss.detach()
    reshard(model)
    return total


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Truth(NamedTuple):
    """Of one process: ten losses, the first step's gradients and norms, and the parameters after the last."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    norms: tuple[torch.Tensor, ...]
    parameters: dict[str, torch.Tensor]


def train(model: LT2, run: Callable[[int], torch.Tensor]) -> Truth:
    # AdamW turns rounding of a gradient near zero into a step of its own size: eps is above it.
    optimizer = build_optimizer(model, OptimizerConfig(lr=3e-4, eps=1e-6))
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    norms: tuple[torch.Tensor, ...] = ()
    for step in range(N_STEPS):
        losses.append(run(step).item())
        step_norms = clip_grad_norm(model, 0.1)
        if step == 0:
            gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
            norms = tuple(step_norms)
        optimizer.step()
        optimizer.zero_grad()
    return Truth(losses, gradients, norms, {name: whole(p).detach() for name, p in model.named_parameters()})


@cache
def one_process(is_tied: bool = True) -> Truth:
    model = whole_model(N_LOOPS, is_tied)

    def run(step: int) -> torch.Tensor:
        loss = loss_of(model, rows(step))
        loss.backward()
        return loss.detach()

    return train(model, run)


def trains_as_one_process(truth: Truth, cases: list[Case]) -> None:
    for case in cases:
        model = sharded_model(N_LOOPS, case)

        def run(step: int, model: LT2 = model, case: Case = case) -> torch.Tensor:
            loss = backward(model, case, step)
            dist.all_reduce(loss)
            return loss

        result = train(model, run)
        assert result.losses == pytest.approx(truth.losses, rel=1e-5), case
        torch.testing.assert_close(result.norms, truth.norms, rtol=1e-5, atol=0.0, msg=str(case))
        for name, gradient in truth.gradients.items():
            largest = gradient.abs().max().item()
            torch.testing.assert_close(
                result.gradients[name], gradient, rtol=1e-5, atol=1e-5 * largest, msg=f"{case} {name}"
            )
        for name, parameter in truth.parameters.items():
            torch.testing.assert_close(result.parameters[name], parameter, rtol=1e-3, atol=1e-4, msg=f"{case} {name}")


def travels(n_loops: int, case: Case) -> tuple[int, int, int]:
    """(all-gathers, reduce-scatters, all-reduces) of one optimizer step."""
    model = sharded_model(n_loops, case)
    counted = collectives(lambda: backward(model, case))
    return counted["gather"], counted["reduce_scatter"], counted["all_reduce"]


def per_step_gathers_once() -> None:
    for n_loops in (1, 2, 4, 8):
        assert travels(n_loops, Case()) == (GROUPS, GROUPS, 0)
        assert travels(n_loops, Case(n_microbatches=2)) == (GROUPS, 2 * GROUPS, 0)
        # What earlier microbatches left of a block is reduced in its first visit, the last one's share in its last.
        deferred = GROUPS if n_loops == 1 else GROUPS + N_LAYERS
        assert travels(n_loops, Case(n_microbatches=2, defers=True)) == (GROUPS, deferred, 0)
    assert travels(2, Case(n_microbatches=4, defers=True)) == (GROUPS, GROUPS + N_LAYERS, 0)


def other_policies_gather_more() -> None:
    for n_loops, m in ((1, 1), (3, 1), (3, 2)):
        gathers, reductions, _ = travels(n_loops, Case("per_pass", m))
        assert (gathers, reductions) == (N_LAYERS * (m + 1) + 1, m * GROUPS)
        gathers, reductions, _ = travels(n_loops, Case("per_visit", m))
        assert (gathers, reductions) == ((2 * N_LAYERS * n_loops + 1) * m, m * GROUPS)


def truncated_steps_are_counted_as_estimated() -> None:
    """Loops without gradients have no backward pass to gather for, and an untied embedding none to reduce."""
    models = [(3, 1, True, 2), (4, 2, False, 2), (3, 1, False, 1)]
    policies = [("per_step", True), ("per_pass", False), ("per_visit", True)]
    for (n_loops, n_backward_loops, is_tied, n_layers), (policy, defers) in product(models, policies):
        case = Case(policy, 2, defers, is_tied=is_tied, n_layers=n_layers)
        model = sharded_model(n_loops, case)
        found = collectives(partial(backward, model, case, n_backward_loops=n_backward_loops))
        predicted = of_parameters(
            build_on_meta(model_config(n_loops, is_tied, n_layers), "reference"),
            Layout(n_shards=2, loop_reshard=policy, defers_reductions=defers),
            n_microbatches=2,
            n_loops=n_loops,
            n_backward_loops=n_backward_loops,
            dtype=torch.float32,
            reduce_dtype=torch.float32,
        )
        gathers, reductions = (sent.n_times for sent in predicted.values())
        assert (found["gather"], found["reduce_scatter"]) == (gathers, reductions), (n_loops, case)


def an_untied_embedding_is_a_group() -> None:
    groups, m = GROUPS + 1, 2
    for n_loops in (1, 4):
        assert travels(n_loops, Case(is_tied=False)) == (groups, groups, 0)
        assert travels(n_loops, Case("per_pass", m, is_tied=False)) == (N_LAYERS * (m + 1) + 2, m * groups, 0)
        per_visit = (2 * N_LAYERS * n_loops + 3) * m
        assert travels(n_loops, Case("per_visit", m, is_tied=False)) == (per_visit, m * groups, 0)
    deferred = groups + N_LAYERS  # the embedding and the head are used once per microbatch
    assert travels(4, Case(n_microbatches=2, defers=True, is_tied=False)) == (groups, deferred, 0)


def the_next_block_is_on_its_way() -> None:
    """When a block starts to compute, gathers have been issued of the root, of itself and of the next one (and of an
    embedding of its own)."""

    def mark(*_: Any) -> None:
        with record_function("a block starts"):
            pass

    for loop_reshard, is_tied in product(("per_step", "per_visit"), (True, False)):
        model = sharded_model(1, Case(loop_reshard, is_tied=is_tied))
        for block in model.core.blocks:
            block.mixer.register_forward_pre_hook(mark)
        names = event_names(lambda model=model: loss_of(model, rows()))  # type: ignore[misc]
        gathers = {name for name in names if name.startswith("c10d::") and "allgather" in name}
        order = "".join("b" if name == "a block starts" else "g" if name in gathers else "" for name in names)
        assert order == ("gggbb" if is_tied else "ggggbb"), order
        reshard(model)


def recomputed_loops_hold_every_block() -> None:
    """Under per_visit, in the backward pass; anything else holds the block at work, beside what is on its way."""
    for mode, n_most in (("none", 1), ("block", 1), ("loop", 5), ("nested", 5)):
        model = build_on_meta(model_config(N_LOOPS, n_layers=5), "reference")
        dims = ParallelDims.build(ParallelismConfig(), "cpu")
        precision = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
        parallelize(model, dims, activation_checkpoint=mode, loop_reshard="per_visit", **precision)  # type: ignore[arg-type]
        materialise(model, CPU, seed=3)
        whole_blocks: list[int] = []

        def count(gradient: torch.Tensor, model: LT2 = model, whole_blocks: list[int] = whole_blocks) -> None:
            first = (next(block.parameters()) for block in model.core.blocks)
            whole_blocks.append(sum(not isinstance(parameter, DTensor) for parameter in first))

        for block in model.core.blocks:
            block.mixer.register_forward_hook(lambda _, __, out, count=count: out[0].register_hook(count) and None)
        loss_of(model, rows()).backward()
        reshard(model)
        assert whole_blocks and max(whole_blocks) == n_most, (mode, whole_blocks)


def replicas_reduce_once_more() -> None:
    for n_loops in (1, 4):
        assert travels(n_loops, Case(replicate=2)) == (GROUPS, GROUPS, GROUPS)
        assert travels(n_loops, Case(n_microbatches=2, replicate=2)) == (GROUPS, 2 * GROUPS, 2 * GROUPS)
        # Deferred, replicas reduce what shards do: 5 groups, of which with loops the 4 blocks are reduced twice.
        n = 5 if n_loops == 1 else 9
        assert travels(n_loops, Case(n_microbatches=2, defers=True, replicate=2, n_layers=4)) == (5, n, n)


def observers_see_whole_weights() -> None:
    """Attention to the first token is measured with a block's own weights, after FSDP has let go of them."""
    case = Case("per_visit")
    sharded, one = sharded_model(N_LOOPS, case), whole_model(N_LOOPS)

    def batch(tokens: torch.Tensor) -> Batch:
        positions = torch.arange(8).expand(tokens.shape[0], 8)
        return Batch(tokens[:, :-1], tokens[:, 1:], positions, None, torch.zeros(()), None)

    with kept_gathered(sharded, case.loop_reshard):
        seen = validation_diagnostics(sharded, [batch(rows().chunk(2)[dist.get_rank()])], CPU)
    expected = validation_diagnostics(one, [batch(rows())], CPU)
    assert f"first_token_mass/loop_{N_LOOPS}" in expected
    assert seen == pytest.approx(expected, rel=1e-5)
    # Afterwards the policy is the old one.
    assert collectives(lambda: backward(sharded, case))["gather"] == 2 * N_LAYERS * N_LOOPS + 1


def replicas_checkpoint_as_shards_do(folder: Path) -> None:
    """What two replicas of two shards wrote, four shards read, bit for bit."""
    case = Case(replicate=2)
    written = sharded_model(N_LOOPS, case)
    optimizer = build_optimizer(written, OptimizerConfig())
    backward(written, case)
    optimizer.step()
    manager = CheckpointManager(folder / "checkpoint", CheckpointConfig(enable=True))
    manager.save(1, model=written, optimizer=optimizer, train_state={}, data_state={}, config_text="")
    read = sharded_model(N_LOOPS, Case())
    read_optimizer = build_optimizer(read, OptimizerConfig())
    loaded = manager.restore(model=read, optimizer=read_optimizer)
    assert loaded is not None and loaded.step == 1
    for (name, ours), theirs in zip(written.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(whole(ours), whole(theirs)), name
        ours_moment, theirs_moment = optimizer.state[ours]["exp_avg"], read_optimizer.state[theirs]["exp_avg"]
        assert torch.equal(whole(ours_moment), whole(theirs_moment)), name


def _start(rank: int, n_ranks: int, folder: Path, work: list[Callable[[], None]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=n_ranks)
    for part in work:
        part()
    dist.barrier()
    os._exit(0)  # as lt2titan.train leaves: tearing down races with gloo's threads


def spawn(n_ranks: int, *work: Callable[[], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parts = [partial(part, Path(folder)) if part is replicas_checkpoint_as_shards_do else part for part in work]
        mp.spawn(_start, args=(n_ranks, Path(folder), parts), nprocs=n_ranks)  # type: ignore[no-untyped-call]


# Starting processes takes longer than what they do: one launch per number of ranks.
def test_one_rank() -> None:
    cases = [Case("per_pass", 2), Case("per_visit", 2, defers=True)]
    spawn(1, partial(trains_as_one_process, one_process(), cases), recomputed_loops_hold_every_block)


def test_two_ranks() -> None:
    cases = [
        Case("per_step", 2, defers=True),
        Case("per_pass", 2),
        Case("per_visit"),
        Case("per_step", 2, replicate=2, cpu_offload=True),
    ]
    untied = [Case("per_step", 2, defers=True, is_tied=False), Case("per_visit", is_tied=False)]
    spawn(
        2,
        partial(trains_as_one_process, one_process(), cases),
        partial(trains_as_one_process, one_process(is_tied=False), untied),
        per_step_gathers_once,
        other_policies_gather_more,
        truncated_steps_are_counted_as_estimated,
        an_untied_embedding_is_a_group,
        the_next_block_is_on_its_way,
        observers_see_whole_weights,
    )


def test_four_ranks() -> None:
    cases = [Case("per_pass", 2, defers=True, replicate=2), Case("per_visit", replicate=2)]
    spawn(
        4,
        partial(trains_as_one_process, one_process(), cases),
        replicas_reduce_once_more,
        replicas_checkpoint_as_shards_do,
    )


@pytest.mark.wide
@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("policy", ["per_step", "per_pass", "per_visit"])
def test_every_policy(n_ranks: int, policy: str) -> None:
    cases = [
        Case(policy, n_microbatches, defers, replicate, offload)
        for n_microbatches, defers in ((1, False), (2, False), (2, True))
        for replicate in (1, 2, 4)
        for offload in (False, True)
        if n_ranks % replicate == 0
    ]
    spawn(n_ranks, partial(trains_as_one_process, one_process(), cases))
