"""Memory of activations that tensor- and context-parallel ranks keep: alive in a run, against the estimate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from inductor_graphs import inductor_without_kernels
from live_bytes import Live
from split_models import (
    FOUR_HEADS,
    LAYOUTS,
    LENGTH,
    ONE_KEY_HEAD,
    batches,
    config,
    last_rank,
    loss_of,
    own_part,
    split_model,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lt2titan.data.packing import Batch
from lt2titan.model.config import ModelConfig
from lt2titan.model.context import Context
from lt2titan.model.init import build_on_meta
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import MixersConfig
from lt2titan.model.recompute import KEEP_ALL
from lt2titan.parallel.activation_checkpoint import apply_activation_checkpoint, recompute_plan
from lt2titan.parallel.activation_memory import core_memory
from lt2titan.parallel.fake_blocks import first_share
from lt2titan.parallel.layout import Layout

MODES = [("none", 0), ("block", 0), ("selective", 0), ("selective", 1), ("loop", 0), ("nested", 1)]


def plain(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def storage_of(tensor: Tensor) -> int:
    return plain(tensor).untyped_storage()._cdata


def core_inputs(model: LT2, part: list[Batch]) -> tuple[Tensor, Context]:
    """What the core is called with, after a pass that gathers what FSDP2 shards, which stays."""
    inputs: list[Any] = []
    hook = model.core.register_forward_pre_hook(lambda _, arguments: inputs.extend(arguments[:2]))
    loss_of(model, part)
    hook.remove()
    h, context = inputs
    return h.detach().requires_grad_(), context


def check(layout: Layout, shape: ModelConfig, packed: bool = False) -> None:
    """Alive after the core's forward pass, byte for byte, in every mode. All ranks but one are pretended."""
    sizes = core_memory(
        first_share(build_on_meta(shape, "reference"), layout),
        batch_size=2,
        length=LENGTH // layout.n_context,
        dtype=torch.float32,
        n_documents=6 if packed else 0,
        n_context=layout.n_context,
        n_token_shares=layout.n_token_shares,
    )
    with last_rank(layout) as dims:
        model = split_model(shape, dims, layout.sequence_parallel)
        h, context = core_inputs(model, own_part(batches(0, packed), dims)[:1])
        rotary, layouts = context.rotary, context.key_blocks
        shared = tree_leaves([context.positions, rotary, context.cu_seqlens, context.chunk_indices, layouts])
        weights = [plain(p) for p in model.parameters()]
        given = [h, *weights, *shared, *tree_leaves(vars(context.stretch) if context.stretch else [])]
        for mode, skip_last_loops in MODES:
            apply_activation_checkpoint(model, mode, skip_last_loops=skip_last_loops)
            with Live([t for t in given if isinstance(t, torch.Tensor)]) as live:
                y, _ = model.core(h, context)
            # The shared tensors were there before, as the first loop's input was; the output is nothing that is kept.
            kept = live.now + sizes.shared + sizes.input - y.untyped_storage().nbytes()
            predicted = sizes.under(recompute_plan(mode, skip_last_loops)).kept
            # FSDP2 ties every input of a block to the graph, even the carry that the first one does not read.
            of_fsdp = sizes.carry if mode == "none" else 0
            numbers = 8 if "dsa" in shape.layer_mixers else 0  # the indexers' loss, its first and its last value
            assert predicted + of_fsdp == pytest.approx(kept, rel=0, abs=numbers), (mode, skip_last_loops)
            del y


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixer", MixersConfig.names())
def test_mixers(layout: str, mixer: str) -> None:
    check(LAYOUTS[layout], config(mixer))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_rows(layout: str) -> None:
    check(LAYOUTS[layout], config("gdn", "full"), packed=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_key_heads_that_ranks_share(layout: str) -> None:
    check(LAYOUTS[layout], config("gdn", "dsa", mixers=ONE_KEY_HEAD), packed=True)


def test_more_ranks() -> None:
    check(Layout(n_tensor=4), config("gdn", "hgrn2", mixers=FOUR_HEADS))
    check(Layout(n_tensor=4, sequence_parallel=False), config("gdn", "full", mixers=FOUR_HEADS))


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sequence parallel", "whole residual stream"])
def test_compiled_blocks(sequence_parallel: bool) -> None:
    mp.spawn(_compiled, args=(sequence_parallel,), nprocs=1)  # type: ignore[no-untyped-call]  # compiled code knows of groups


def _compiled(_: int, sequence_parallel: bool) -> None:
    """As autograd packs it, weights left out: byte for byte, with the partitioner of inductor."""
    torch.set_num_threads(1)
    shape, layout = replace(config("full"), n_loops=2), Layout(n_tensor=2, sequence_parallel=sequence_parallel)
    sizes = core_memory(
        first_share(build_on_meta(shape, "reference"), layout),
        batch_size=2,
        length=LENGTH,
        dtype=torch.float32,
        n_token_shares=layout.n_token_shares,
        is_compiled=True,
    )
    with last_rank(layout) as dims:
        model = split_model(shape, dims, sequence_parallel, compile_backend=inductor_without_kernels)
        h, context = core_inputs(model, batches(0, packed=False)[:1])  # compiles
        saved: list[Tensor] = []
        with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
            model.core(h, context)
        weights = {storage_of(p) for p in model.parameters()}
        kept = {storage_of(t): t.untyped_storage().nbytes() for t in saved}
    unused = context.positions.nbytes  # by autograd
    assert sizes.under(KEEP_ALL).kept == sum(n for key, n in kept.items() if key not in weights) + unused
