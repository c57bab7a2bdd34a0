"""Models split over processes and the same models whole, to compare: values, losses, gradients of every mixer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lt2titan.config.job import JobConfig
from lt2titan.data.device import model_inputs
from lt2titan.data.packing import Batch
from lt2titan.evaluation.validate import evaluate
from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.layout_plan import convert_to_float8, estimate_communication
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.head import IGNORE_INDEX
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import (
    DeltaNetConfig,
    DSAConfig,
    FullConfig,
    GDNConfig,
    GLAConfig,
    HGRN2Config,
    KDAConfig,
    Mamba2Config,
    MixersConfig,
    NSAConfig,
    RetNetConfig,
    RWKV7Config,
    WindowConfig,
)
from lt2titan.optim.clip import clip_grad_norm
from lt2titan.optim.config import OptimizerConfig
from lt2titan.optim.optimizer import build_optimizer
from lt2titan.parallel.communication_estimate import Sent
from lt2titan.parallel.config import ActivationCheckpointConfig, Float8Config, ParallelismConfig
from lt2titan.parallel.fake_blocks import first_share
from lt2titan.parallel.fsdp import reshard
from lt2titan.parallel.layout import Layout
from lt2titan.parallel.mesh import ParallelDims
from lt2titan.parallel.parallelize import parallelize

CPU = torch.device("cpu")
VOCABULARY, N_ROWS, LENGTH = 20, 4, 12

MIXERS = MixersConfig(
    full=FullConfig(n_heads=4, n_kv_heads=2, output_gate=True),
    window=WindowConfig(n_heads=4, window=5),
    retnet=RetNetConfig(n_heads=2, expand_k=1.5, expand_v=1.25),
    mamba2=Mamba2Config(n_heads=4, n_groups=2, state_size=6),
    gla=GLAConfig(n_heads=2, expand_k=0.75, decay_rank=3),
    hgrn2=HGRN2Config(n_heads=2),
    deltanet=DeltaNetConfig(n_heads=2, expand_v=1.25),
    gdn=GDNConfig(n_heads=2, n_v_heads=4),
    kda=KDAConfig(n_heads=2, n_v_heads=4, expand_v=1.5),
    rwkv7=RWKV7Config(head_dim=8, decay_rank=3, a_rank=4, v_rank=5, gate_rank=6),
    nsa=NSAConfig(n_heads=4, n_kv_heads=1, block_size=2, n_blocks=4, window=3),
    dsa=DSAConfig(n_heads=4, n_kv_heads=2, output_gate=True, top_k=3, n_index_heads=3, index_head_dim=6),
)
ONE_GROUP = replace(MIXERS, mamba2=Mamba2Config(n_heads=4, n_groups=1, state_size=6))
TWO_KEY_HEADS = replace(MIXERS, nsa=NSAConfig(n_heads=4, n_kv_heads=2, block_size=2, n_blocks=4, window=3))
ONE_KEY_HEAD = replace(MIXERS, dsa=replace(MIXERS.dsa, n_kv_heads=1))
THREE_KEY_HEADS = replace(MIXERS, dsa=replace(MIXERS.dsa, n_heads=6, n_kv_heads=3))
"""Of dsa, for a width that 6 heads divide; rank 0 of two has the middle key head for one of its query heads only."""
FOUR_HEADS = replace(
    MIXERS,
    full=FullConfig(n_heads=4, n_kv_heads=4),
    gdn=GDNConfig(n_heads=4),
    hgrn2=HGRN2Config(n_heads=4),
    retnet=RetNetConfig(n_heads=4),
)

LAYOUTS = {
    "tensor": Layout(n_tensor=2, sequence_parallel=True),
    "tensor, whole residual stream": Layout(n_tensor=2, sequence_parallel=False),
    "context": Layout(n_context=2, n_shards=2),
    "context and tensor": Layout(n_context=2, n_shards=2, n_tensor=2, sequence_parallel=True),
}


def config(mixer: str, rare: str = "", mixers: MixersConfig = MIXERS, tied: bool = True) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=16,
        n_layers=2,
        n_loops=3,
        ffn_dim=24,
        tie_embeddings=tied,
        mixer=mixer,
        hybrid=HybridConfig(mixer=rare, ratio=1),
        mixers=mixers,
    )


def unsettle(model: LT2) -> LT2:
    """Move parameters that start neutral, and so are no test of anything, in any layout alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.add_(noise)
    return model


def whole_model(config: ModelConfig) -> LT2:
    model = build_on_meta(config, "reference")
    materialise(model, CPU, seed=3)
    return unsettle(model)


def split_model(config: ModelConfig, dims: ParallelDims, sequence_parallel: bool, **options: Any) -> LT2:
    model = build_on_meta(config, "reference")
    options = {"activation_checkpoint": "none", **options}
    parallelize(
        model,
        dims,
        param_dtype=torch.get_default_dtype(),
        reduce_dtype=torch.get_default_dtype(),
        sequence_parallel=sequence_parallel,
        **options,
    )
    materialise(model, CPU, seed=3)
    return unsettle(model)


def rows(step: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (N_ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def batches(step: int, packed: bool) -> list[Batch]:
    """Two of two rows each, with some targets that predict nothing."""
    tokens, targets = rows(step)[:, :-1], rows(step)[:, 1:].clone()
    targets[:, 3] = -100
    positions, cu_seqlens = torch.arange(LENGTH).expand(2, LENGTH), None
    if packed:  # documents that context-parallel ranks cut and do not cut; one has all of a stretch and more
        cu_seqlens = torch.tensor([0, 5, 6, 12, 20, 24, 24], dtype=torch.int32)
        positions = torch.cat([torch.arange(int(n)) for n in cu_seqlens.diff()]).view(2, LENGTH)
    chunks = None if cu_seqlens is None else make_chunk_indices(cu_seqlens)
    return [
        Batch(t, y, positions, cu_seqlens, torch.tensor(1.0), chunks)
        for t, y in zip(tokens.split(2), targets.split(2), strict=True)
    ]


def loss_of(model: LT2, batches: list[Batch], **options: Any) -> torch.Tensor:
    """The cross-entropy and the layers' own losses, divided by the tokens of all ranks."""
    losses = []
    for batch in batches:
        loss, auxiliary = model(**model_inputs(batch, CPU), with_auxiliary=True, **options)
        losses.append(sum(auxiliary.values(), loss))
    return torch.stack(losses).sum() / (N_ROWS * LENGTH)


def own_part(batches: list[Batch], dims: ParallelDims) -> list[Batch]:
    n = len(batches) // dims.dp_size
    own = batches[dims.dp_rank * n : (dims.dp_rank + 1) * n]
    return [batch.stretch(dims.context_rank, dims.context) for batch in own] if dims.context > 1 else own


def whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative_error(tensor: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    return float((whole(tensor) - whole(expected)).norm() / whole(expected).norm())


def check_same(
    config: ModelConfig,
    dims: ParallelDims,
    *,
    sequence_parallel: bool = True,
    packed: bool = False,
    n_steps: int = 1,
    options: dict[str, Any] | None = None,
    **layout: Any,
) -> None:
    """Initial values equal; loss, all gradients and their norm those of the whole model, in fp64.

    In fp32 rounding alone moves some gradients of these small models by 1e-3.
    """
    one, split = whole_model(config), split_model(config, dims, sequence_parallel, **layout)
    expected = dict(one.named_parameters())
    for name, parameter in split.named_parameters():
        assert torch.equal(whole(parameter), expected[name]), name
    optimizers = [build_optimizer(model, OptimizerConfig(lr=1e-3)) for model in (one, split)]
    for step in range(n_steps):
        expected_loss = loss_of(one, batches(step, packed), **(options or {}))
        expected_loss.backward()
        loss = loss_of(split, own_part(batches(step, packed), dims), **(options or {}))
        loss.backward()
        reshard(split)
        loss = loss.detach()
        dist.all_reduce(loss, group=dims.loss_group)
        torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-11, atol=0)
        if step == 0:
            errors = {name: relative_error(p.grad, expected[name].grad) for name, p in split.named_parameters()}
            assert all(error < 1e-10 for error in errors.values()), errors  # NaN is no smaller
        torch.testing.assert_close(clip_grad_norm(split, 1e9), clip_grad_norm(one, 1e9), rtol=1e-10, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def check_evaluated(config: ModelConfig, dims: ParallelDims) -> None:
    """Every target is counted once, whichever ranks see it."""
    text = batches(0, packed=False)
    evaluation = evaluate(split_model(config, dims, True), own_part(text, dims), CPU, [1], dims.loss_group)
    assert evaluation.n_tokens == sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in text)
    for n_loops, loss in ((3, evaluation.loss), (1, evaluation.loss_at[1])):
        with torch.no_grad():
            nats = loss_of(whole_model(config), text, n_loops=n_loops).item() * N_ROWS * LENGTH
        assert abs(loss * evaluation.n_tokens / nats - 1) < 1e-10


def _start(rank: int, n_ranks: int, rendezvous: str, work: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=n_ranks)
    work()
    dist.barrier()
    os._exit(0)  # as lt2titan.train leaves: tearing down races with gloo's threads


def run(n_ranks: int, work: Callable[[], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = (n_ranks, str(Path(folder) / "rendezvous"), work)
        mp.spawn(_start, args=args, nprocs=n_ranks)  # type: ignore[no-untyped-call]


def in_turn(works: list[Callable[[], None]]) -> None:
    for work in works:
        work()


@contextmanager
def last_rank(layout: Layout) -> Iterator[ParallelDims]:
    """Be the last of the ranks, of which the others are not there."""
    n_ranks = layout.n_tensor * layout.n_context
    dist.init_process_group("fake", store=FakeStore(), rank=n_ranks - 1, world_size=n_ranks)
    degrees = ParallelismConfig(tensor_parallel_degree=layout.n_tensor, context_parallel_degree=layout.n_context)
    try:
        yield ParallelDims.build(degrees, "cpu")
    finally:
        dist.destroy_process_group()


def estimated(
    config: ModelConfig,
    layout: Layout,
    mode: str = "none",
    *,
    packed: bool = False,
    is_compiled: bool = False,
    skip_last_loops: int = 0,
    n_microbatches: int = 1,
    recipe: Any = "none",
) -> dict[str, Sent]:
    """What tensor and context ranks send of the first of `batches`, in fp64; maps in float8 as ``recipe`` says."""
    job = JobConfig(model=config)
    job.training.seq_len, job.training.local_batch_size = LENGTH, 2
    job.training.global_batch_size = 2 * n_microbatches
    job.data.document_mask, job.data.max_documents_per_sample = packed, 3
    job.compile.enable = is_compiled
    job.activation_checkpoint = ActivationCheckpointConfig(mode=mode, skip_last_loops=skip_last_loops)  # type: ignore[arg-type]
    job.parallelism.tensor_parallel_degree, job.parallelism.context_parallel_degree = layout.n_tensor, layout.n_context
    job.float8 = Float8Config(recipe=recipe, emulate=True, auto_filter=False, min_size=16)
    model = build_on_meta(config, "reference")
    convert_to_float8(job, model, layout.n_tensor * layout.n_context)
    sent = estimate_communication(job, first_share(model, layout), layout, torch.float64, torch.float64)
    return {name: n for name, n in sent.items() if "shard" not in name}
