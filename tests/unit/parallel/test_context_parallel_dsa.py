"""Indexers and their choices over rows split over processes, against whole ones: losses, gradients, figures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from split_models import (
    CPU,
    LENGTH,
    MIXERS,
    batches,
    check_evaluated,
    check_same,
    config,
    in_turn,
    own_part,
    run,
    split_model,
    whole_model,
)

from lt2titan.evaluation import loop_diagnostics
from lt2titan.evaluation.loop_diagnostics import validation_diagnostics
from lt2titan.model.mixers.config import MixersConfig
from lt2titan.parallel.activation_memory import core_memory
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.mesh import ParallelDims


def chosen_by(**options: Any) -> MixersConfig:
    return replace(MIXERS, dsa=replace(MIXERS.dsa, **options))


REUSED = chosen_by(reuse_every=2, forced_first=True, forced_local=1)


def mesh(context: int, **degrees: int) -> ParallelDims:
    return ParallelDims.build(ParallelismConfig(context_parallel_degree=context, **degrees), "cpu")


def choices_of_every_kind() -> None:
    """Of earlier loops and new ones, with tokens that are forced; none, while the indexer learns from all keys and
    where rows have no more than may be chosen; and of more than the first stretch has."""
    dims = mesh(2)
    for packed in (False, True):
        check_same(config("gdn", "dsa", mixers=REUSED), dims, packed=packed, n_steps=2)
        check_same(config("dsa"), dims, packed=packed, options={"sees_all": True})
        for top_k in (LENGTH // 2 + 2, LENGTH):
            check_same(config("dsa", mixers=chosen_by(top_k=top_k)), dims, packed=packed)


def recompute_and_fewer_loops() -> None:
    dims = mesh(2)
    for mode in ("block", "selective", "loop", "nested"):
        check_same(config("dsa", mixers=REUSED), dims, activation_checkpoint=mode, packed=mode != "loop")
    check_same(config("dsa", mixers=REUSED), dims, options={"n_backward_loops": 2})


def diagnosed_alike() -> None:
    loop_diagnostics.QUERIES_PER_ROW = 3  # every fourth token, which in the second half is not its first
    dims = mesh(2)
    for packed, mixers in ((False, MIXERS), (True, MIXERS), (True, REUSED)):
        for sees_all in (False, True):
            shape, text = config("gdn", "dsa", mixers=mixers), batches(0, packed)
            one, split = whole_model(shape), split_model(shape, dims, True)
            expected = validation_diagnostics(one, text, CPU, sees_all)
            found = validation_diagnostics(split, own_part(text, dims), CPU, sees_all)
            assert len(expected) == 3 * 3 - 1  # no overlap in the first loop
            assert found == pytest.approx(expected, rel=1e-10)


def evaluated_alike() -> None:
    check_evaluated(config("gdn", "dsa"), mesh(2))


def selections_are_as_large_as_predicted() -> None:
    """The carry has room for what is chosen: no more than a stretch and those before it have."""
    mixers = chosen_by(reuse_every=2, top_k=LENGTH // 2 + 2)
    core = core_memory(
        whole_model(config("dsa", mixers=mixers)), batch_size=2, length=6, dtype=torch.float64, n_context=2
    )
    n_layers, kl = 2, 8
    assert core.carry == n_layers * 4 * 2 * 6 * (LENGTH // 2 + 2) + kl


def four_stretches() -> None:
    dims = mesh(4)
    for packed in (False, True):
        check_same(config("dsa"), dims, packed=packed)
    check_same(config("dsa", mixers=REUSED), dims, packed=True)
    check_same(config("dsa"), dims, packed=True, options={"sees_all": True})


def with_fsdp_and_tensor_parallelism() -> None:
    check_same(config("dsa", mixers=REUSED), mesh(2), packed=True, n_steps=2)
    dims = mesh(2, tensor_parallel_degree=2)
    assert (dims.shard, dims.context, dims.tensor) == (1, 2, 2)
    check_same(config("gdn", "dsa", mixers=REUSED), dims, packed=True, n_steps=2)
    check_same(config("dsa"), dims, sequence_parallel=False, options={"sees_all": True})
    one_key_head = replace(REUSED, dsa=replace(REUSED.dsa, n_kv_heads=1))
    check_same(config("dsa", mixers=one_key_head), dims, packed=True)


def compiled() -> None:
    dims = mesh(2)
    for packed in (False, True):
        check_same(config("gdn", "dsa", mixers=REUSED), dims, compile_backend="aot_eager", packed=packed)


def test_two_ranks_against_one() -> None:
    works = [choices_of_every_kind, recompute_and_fewer_loops, diagnosed_alike, evaluated_alike]
    run(2, partial(in_turn, [*works, selections_are_as_large_as_predicted]))


@pytest.mark.wide
def test_four_ranks_against_one() -> None:
    run(4, partial(in_turn, [four_stretches, with_fsdp_and_tensor_parallelism]))


@pytest.mark.wide
def test_compiled_blocks() -> None:
    run(2, compiled)
