"""Blocks chosen of rows split over processes, against whole rows: losses, gradients, figures, and what is sent."""

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
    TWO_KEY_HEADS,
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

from lt2titan.config.section import ConfigError
from lt2titan.evaluation import loop_diagnostics
from lt2titan.evaluation.loop_diagnostics import validation_diagnostics
from lt2titan.model.init import build_on_meta
from lt2titan.model.mixers.config import MixersConfig, NSAConfig
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.context_parallel import apply_context_parallel
from lt2titan.parallel.distributed import fake_process_group
from lt2titan.parallel.mesh import ParallelDims


def blocks_of(size: int, **options: Any) -> MixersConfig:
    return replace(MIXERS, nsa=replace(MIXERS.nsa, block_size=size, **options))


def mesh(context: int, **degrees: int) -> ParallelDims:
    return ParallelDims.build(ParallelismConfig(context_parallel_degree=context, **degrees), "cpu")


def blocks_of_every_size() -> None:
    """Single tokens; some that stretches cut; one that is longer than a stretch."""
    dims = mesh(2)
    for packed in (False, True):
        for size in (1, 4, 8):
            check_same(config("nsa", mixers=blocks_of(size, n_blocks=3)), dims, packed=packed)
        check_same(config("nsa", mixers=TWO_KEY_HEADS), dims, packed=packed)


def recompute_and_fewer_loops() -> None:
    dims = mesh(2)
    for mode in ("block", "selective", "loop", "nested"):
        check_same(config("nsa"), dims, activation_checkpoint=mode, packed=mode != "loop")
    check_same(config("gdn", "nsa"), dims, options={"n_loops": 2, "n_backward_loops": 1})


def diagnosed_alike() -> None:
    dims = mesh(2)
    # Of three queries every one is the fourth token, which in the second half is not its first. Packed documents are
    # short, and only blocks of one token leave some of them a choice.
    for packed, size, n_queries in ((False, 2, 3), (True, 1, LENGTH)):
        loop_diagnostics.QUERIES_PER_ROW = n_queries
        shape, text = config("gdn", "nsa", mixers=blocks_of(size)), batches(0, packed)
        expected = validation_diagnostics(whole_model(shape), text, CPU)
        found = validation_diagnostics(split_model(shape, dims, True), own_part(text, dims), CPU)
        assert len(expected) == 3 * 3 - 1  # no overlap in the first loop
        assert found == pytest.approx(expected, rel=1e-10)


def evaluated_alike() -> None:
    check_evaluated(config("gdn", "nsa"), mesh(2))


def four_stretches() -> None:
    dims = mesh(4)
    for packed in (False, True):
        check_same(config("nsa"), dims, packed=packed)
        check_same(config("nsa", mixers=blocks_of(4, n_blocks=3)), dims, packed=packed)


def with_fsdp_and_tensor_parallelism() -> None:
    check_same(config("gdn", "nsa"), mesh(2), packed=True, n_steps=2, loop_reshard="per_visit")
    dims = mesh(2, tensor_parallel_degree=2)
    assert (dims.shard, dims.context, dims.tensor) == (1, 2, 2)
    check_same(config("nsa"), dims, packed=True, n_steps=2)
    check_same(config("gdn", "nsa", mixers=TWO_KEY_HEADS), dims, sequence_parallel=False)


def compiled() -> None:
    dims = mesh(2)
    for packed in (False, True):
        check_same(config("nsa", "full"), dims, compile_backend="aot_eager", packed=packed)


def test_two_ranks_against_one() -> None:
    works = [blocks_of_every_size, recompute_and_fewer_loops, diagnosed_alike, evaluated_alike]
    run(2, partial(in_turn, works))


@pytest.mark.wide
def test_four_ranks_against_one() -> None:
    run(4, partial(in_turn, [four_stretches, with_fsdp_and_tensor_parallelism]))


@pytest.mark.wide
def test_compiled_blocks() -> None:
    run(2, compiled)


def test_attention_in_fp32_on_a_gpu_is_refused() -> None:
    """The window's is `attention`, which takes keys of other ranks in half precision alone."""
    with fake_process_group(2):
        dims, model = mesh(2), build_on_meta(config("nsa", mixers=MixersConfig(nsa=NSAConfig(n_heads=4))), "fla")
        assert dims.context_mesh is not None
        apply_context_parallel(model, dims.context_mesh)
        with pytest.raises(ConfigError, match=r"mixed_precision_param = 'float32'.*bfloat16"):
            apply_context_parallel(model, dims.context_mesh, param_dtype=torch.float32)
