"""Memory of activations that tensor- and context-parallel ranks keep: alive in a run, against the estimate."""

from __future__ import annotations

import pytest
import torch
from live_bytes import Live
from split_models import FOUR_HEADS, LAYOUTS, LENGTH, batches, config, last_rank, loss_of, own_part, split_model
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lt2titan.model.config import ModelConfig
from lt2titan.model.init import build_on_meta
from lt2titan.model.mixers.config import MixersConfig
from lt2titan.parallel.activation_checkpoint import apply_activation_checkpoint, recompute_plan
from lt2titan.parallel.activation_memory import core_memory
from lt2titan.parallel.fake_blocks import first_share
from lt2titan.parallel.layout import Layout

MODES = [("none", 0), ("block", 0), ("selective", 0), ("selective", 1), ("loop", 0), ("nested", 1)]


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
        model, inputs = split_model(shape, dims, layout.sequence_parallel), []
        hook = model.core.register_forward_pre_hook(lambda _, arguments: inputs.extend(arguments[:2]))
        loss_of(model, own_part(batches(0, packed), dims)[:1])  # gathers what FSDP2 shards, which stays
        hook.remove()
        h, context = inputs
        h = h.detach().requires_grad_()
        rotary, layouts = context.rotary, context.key_blocks
        shared = tree_leaves([context.positions, rotary, context.cu_seqlens, context.chunk_indices, layouts])
        weights = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
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
            numbers = 8 if shape.mixer == "dsa" else 0  # the indexers' loss, its first and its last value
            assert predicted + of_fsdp == pytest.approx(kept, rel=0, abs=numbers), (mode, skip_last_loops)
            del y


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixer", MixersConfig.names())
def test_mixers(layout: str, mixer: str) -> None:
    check(LAYOUTS[layout], config(mixer))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_rows(layout: str) -> None:
    check(LAYOUTS[layout], config("gdn", "full"), packed=True)


def test_more_ranks() -> None:
    check(Layout(n_tensor=4), config("gdn", "hgrn2", mixers=FOUR_HEADS))
    check(Layout(n_tensor=4, sequence_parallel=False), config("gdn", "full", mixers=FOUR_HEADS))
