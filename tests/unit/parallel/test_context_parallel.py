"""Models whose rows are split over processes against whole ones: values, losses, gradients of every mixer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from counted_collectives import collectives
from split_models import (
    CPU,
    LENGTH,
    ONE_GROUP,
    batches,
    check_evaluated,
    check_same,
    config,
    estimated,
    in_turn,
    loss_of,
    own_part,
    rows,
    run,
    split_model,
    whole_model,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from lt2titan.config.job import JobConfig
from lt2titan.config.section import ConfigError
from lt2titan.evaluation import loop_diagnostics
from lt2titan.evaluation.loop_diagnostics import validation_diagnostics
from lt2titan.kernels.attention.ring import ring_problem
from lt2titan.metrics.loop_statistics import LoopStatistics
from lt2titan.model.config import LoopConfig
from lt2titan.model.context import Context
from lt2titan.model.init import build_on_meta
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import MixersConfig
from lt2titan.model.recompute import KEEP_ALL
from lt2titan.model.state import allocate
from lt2titan.parallel.activation_memory import core_memory
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.context_parallel import apply_context_parallel
from lt2titan.parallel.distributed import fake_process_group
from lt2titan.parallel.layout import Layout
from lt2titan.parallel.mesh import ParallelDims


def mesh(context: int, **degrees: int) -> ParallelDims:
    return ParallelDims.build(ParallelismConfig(context_parallel_degree=context, **degrees), "cpu")


def every_mixer() -> None:
    dims = mesh(2)
    for name in MixersConfig.names():
        for packed in (False, True):
            check_same(config(name), dims, packed=packed)


def several_steps() -> None:
    check_same(config("gdn", "full", tied=False), mesh(2), n_steps=4)


def recompute_and_fewer_loops() -> None:
    dims = mesh(2)
    for mode in ("block", "selective", "loop", "nested"):
        check_same(config("rwkv7", "full"), dims, activation_checkpoint=mode, packed=True)
    check_same(config("gdn", "window"), dims, options={"n_loops": 2, "n_backward_loops": 1})


def diagnosed_and_observed_alike() -> None:
    loop_diagnostics.QUERIES_PER_ROW = 3  # every fourth token, which in the second half is not its first
    dims = mesh(2)
    for packed in (False, True):
        shape, text = config("gdn", "full"), batches(0, packed)
        one, split = whole_model(shape), split_model(shape, dims, True)
        figures, statistics = [], [LoopStatistics(3, CPU) for _ in range(2)]
        for model, part, observer in zip((split, one), (own_part(text, dims), text), statistics, strict=True):
            figures.append(validation_diagnostics(model, part, CPU))
            with model.core.observed_by(observer):
                loss_of(model, part)
            figures[-1] |= observer.figures()
        assert len(figures[1]) == 3 * 5
        assert figures[0] == pytest.approx(figures[1], rel=1e-10)


def evaluated_alike() -> None:
    check_evaluated(config("gdn", "full"), mesh(2))


def collectives_per_visit() -> None:
    """One gather of keys and values, and of an indexer's keys with them; one of a recurrence's ends and one for
    its three convolutions.

    In fp64 each rank has, of two rows, for full: 6 tokens with 2 key heads of 4 channels. For retnet: 2 states of
    12 x 10, and 12 x 12 that say what is done to them. For GDN: 4 states of 6 x 6 with 6 x 6, and 3 tokens of 12, 12
    and 24 channels. For NSA as for full, with 1 key head; for DSA as for full, with index keys of 6
    channels. Of two ranks each sends its own.
    """
    dims = mesh(2)
    sizes = {
        "full": 2 * 6 * 2 * 4,
        "retnet": 2 * 12 * (10 + 12),
        "gdn": 4 * 6 * (6 + 6) + 3 * (12 + 12 + 24),
        "nsa": 2 * 6 * 4,
        "dsa": 2 * 6 * 2 * 4 + 6 * 6,
    }
    for name, n_gathers in (("full", 1), ("retnet", 1), ("gdn", 2), ("nsa", 1), ("dsa", 1)):
        split = split_model(config(name), dims, True)
        part = own_part(batches(0, packed=False), dims)[:1]
        loss_of(split, part).backward()  # whatever is made at first, and FSDP2's gathers: it keeps them
        counts = collectives(lambda split=split, part=part: loss_of(split, part).backward())  # type: ignore[misc]
        n_visits, n_groups = 2 * 3, 3
        assert counts["gather"] == n_gathers * n_visits, counts
        assert counts["reduce_scatter"] == n_gathers * n_visits + n_groups, counts
        predicted = estimated(config(name), Layout(n_context=2, n_shards=2))
        assert [sent.n_times for sent in predicted.values()] == [n_gathers * n_visits] * 2
        assert [sent.n_bytes for sent in predicted.values()] == [8 * 2 * sizes[name] * n_visits] * 2, name


def memory_as_predicted() -> None:
    """What the last rank keeps of the core for the backward pass, but for a few bytes; the first one keeps no more."""
    dims = mesh(2)
    assert dims.context_mesh is not None
    for name in ("full", "window", "gdn", "mamba2", "nsa", "dsa"):
        model, given = whole_model(config(name)), []
        apply_context_parallel(model, dims.context_mesh)
        handle = model.core.register_forward_pre_hook(lambda core, args: given.append(args))  # noqa: B023
        (batch, _) = own_part(batches(0, packed=False), dims)
        loss_of(model, [batch])
        handle.remove()
        h, context, *_ = given[0]
        saved = saved_bytes(model, h.detach().requires_grad_(), context)
        sizes = core_memory(model, batch_size=2, length=LENGTH // 2, dtype=torch.float64, n_context=2)
        used = tree_leaves([context.rotary, context.key_blocks])
        unused = sizes.shared - sum(t.nbytes for t in used)  # autograd has no use for other integers
        predicted = sizes.under(KEEP_ALL).kept
        assert saved + unused < predicted + 100, name
        if dims.context_rank == 1:
            assert predicted == pytest.approx(saved + unused, rel=0, abs=100), name


def saved_bytes(model: LT2, h: torch.Tensor, context: Context) -> int:
    """Storages that autograd packs, weights left out."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda t: t):
        model.core(h, context)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    return sum(size for key, size in storages.items() if key not in weights)


def logits_of_a_stretch() -> None:
    dims, shape = mesh(2), config("gdn", "full")
    split, tokens = split_model(shape, dims, True), rows(0)[:, :LENGTH]
    half = LENGTH // 2
    own = slice(dims.context_rank * half, (dims.context_rank + 1) * half)
    with torch.no_grad():  # the positions are the model's own
        torch.testing.assert_close(split(tokens[:, own]), whole_model(shape)(tokens)[:, own])
        with pytest.raises(ValueError, match="does not decode"):
            split(tokens[:, own], state=allocate(whole_model(shape), 4, 8, torch.float64, CPU))


def four_stretches() -> None:
    """A convolution of four taps reaches over a whole stretch of three tokens, and a document over all of them."""
    dims = mesh(4)
    for name in ("gdn", "kda", "mamba2", "rwkv7", "full", "window"):
        for packed in (False, True):
            check_same(config(name), dims, packed=packed)


def with_fsdp_and_tensor_parallelism() -> None:
    check_same(config("gdn", "full"), mesh(2), packed=True, n_steps=2)
    check_same(config("mamba2", "window"), mesh(2), loop_reshard="per_visit", activation_checkpoint="block")
    dims = mesh(2, tensor_parallel_degree=2)
    assert (dims.shard, dims.context, dims.tensor) == (1, 2, 2)
    check_same(config("gdn", "full"), dims, packed=True)
    check_same(config("rwkv7", "mamba2", mixers=ONE_GROUP), dims, sequence_parallel=False, packed=True)
    check_same(config("gdn"), mesh(2, data_parallel_replicate_degree=2), n_steps=2)


def compiled() -> None:
    dims = mesh(2)
    for name in ("gdn", "rwkv7", "retnet"):
        check_same(config(name, "full"), dims, compile_backend="aot_eager", packed=True)


def test_two_ranks_against_one() -> None:
    works = [
        every_mixer,
        several_steps,
        recompute_and_fewer_loops,
        diagnosed_and_observed_alike,
        evaluated_alike,
        collectives_per_visit,
        logits_of_a_stretch,
        memory_as_predicted,
    ]
    run(2, partial(in_turn, works))


def test_four_ranks_against_one() -> None:
    run(4, partial(in_turn, [four_stretches, with_fsdp_and_tensor_parallelism]))


@pytest.mark.wide
def test_compiled_blocks() -> None:
    run(2, compiled)


def test_a_run_is_refused_before_it_starts() -> None:
    job = JobConfig(model=config("gdn"), parallelism=ParallelismConfig(context_parallel_degree=2))
    job.training.dataset, job.training.seq_len, job.validation.enable = "synthetic", 32, False
    job.validate_run(2)
    job.training.seq_len = 33
    with pytest.raises(ConfigError, match=r"^parallelism.context_parallel_degree = 2: .*seq_len = 33.* is 34"):
        job.validate_run(2)
    job.training.seq_len, job.parallelism.context_parallel_degree = 32, 16
    with pytest.raises(ConfigError, match=r"^parallelism.context_parallel_degree = 16: .*2 tokens.* at most 8"):
        job.validate_run(16)
    job.model = replace(config("gla"), mixer="gla")  # looks back through its state alone
    job.validate_run(16)
    job.training.seq_len, job.parallelism.context_parallel_degree = 32, 2
    job.validation.enable, job.validation.seq_len = True, 31
    with pytest.raises(ConfigError, match=r"^parallelism.context_parallel_degree = 2: .*validation.seq_len = 31"):
        job.validate_run(2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda job: setattr(job.data, "document_mask", True), "data.document_mask = true"),
        (lambda job: setattr(job.model, "loop", LoopConfig(windows=[-1, 4, 4])), "model.loop.windows"),
        (lambda job: setattr(job.model, "mixer", "window"), "window layers"),
        (lambda job: setattr(job.model.hybrid, "mixer", ""), "no full layers"),
        (lambda job: setattr(job.training, "mixed_precision_param", "float32"), "float32"),
        (lambda job: setattr(job.parallelism, "context_parallel_degree", 1), "context_parallel_degree = 1"),
    ],
)
def test_a_ring_of_what_is_not_full_and_dense_is_refused(change: Callable[[JobConfig], None], what: str) -> None:
    ring = ParallelismConfig(context_parallel_degree=2, context_parallel_attention="ring")
    job = JobConfig(model=config("gdn", "full"), parallelism=ring)
    job.training.dataset, job.training.seq_len, job.validation.enable = "synthetic", 32, False
    job.validate_run(2)
    change(job)
    with pytest.raises(ConfigError, match=f'context_parallel_attention = .ring.: .*{what}.*"gather"'):
        job.validate_run(2)


def test_a_ring_on_cpu_is_refused() -> None:
    with fake_process_group(2), pytest.raises(ConfigError, match=r'needs GPUs, .* use "gather"'):
        dims = mesh(2)
        assert dims.context_mesh is not None
        apply_context_parallel(whole_model(config("full")), dims.context_mesh, "ring")


def test_this_torch_has_the_ring_that_is_used() -> None:
    assert ring_problem() == ""


def test_softmax_attention_in_fp32_on_a_gpu_is_refused() -> None:
    with fake_process_group(2):
        dims, model = mesh(2), build_on_meta(config("gdn", "full"), "fla")
        assert dims.context_mesh is not None
        apply_context_parallel(model, dims.context_mesh)
        with pytest.raises(ConfigError, match=r"mixed_precision_param = 'float32'.*bfloat16"):
            apply_context_parallel(model, dims.context_mesh, param_dtype=torch.float32)
        with pytest.raises(ConfigError, match=r"mixed_precision_param = 'float32'.*bfloat16"):
            apply_context_parallel(build_on_meta(config("dsa"), "fla"), dims.context_mesh, param_dtype=torch.float32)
        apply_context_parallel(build_on_meta(config("gdn"), "fla"), dims.context_mesh, param_dtype=torch.float32)
