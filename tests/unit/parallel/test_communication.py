"""What tensor- and context-parallel ranks send in a step: counted as split models run, against the estimate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from split_models import (
    LENGTH,
    ONE_GROUP,
    TWO_KEY_HEADS,
    batches,
    config,
    estimated_activations,
    loss_of,
    own_part,
    split_model,
)
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from lt2titan.model import head, parallel_head, shares
from lt2titan.model.config import ModelConfig
from lt2titan.model.init import build_on_meta
from lt2titan.model.mixers.config import MixersConfig
from lt2titan.model.shares import Share
from lt2titan.parallel import communication_estimate
from lt2titan.parallel.communication_estimate import Sent, of_ends, together
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.layout import Layout
from lt2titan.parallel.mesh import ParallelDims

DTYPE = torch.float64


@pytest.fixture(autouse=True)
def in_fp64() -> Iterator[None]:
    torch.set_default_dtype(DTYPE)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def split(layout: Layout, shape: ModelConfig, mode: str = "none", packed: bool = False) -> Iterator[Any]:
    """(a split model, its part of a batch, the tensor-parallel group), as the last of ranks that are not there."""
    n_ranks = layout.n_tensor * layout.n_context
    dist.init_process_group("fake", store=FakeStore(), rank=n_ranks - 1, world_size=n_ranks)
    degrees = ParallelismConfig(tensor_parallel_degree=layout.n_tensor, context_parallel_degree=layout.n_context)
    try:
        dims = ParallelDims.build(degrees, "cpu")
        model = split_model(shape, dims, layout.sequence_parallel, activation_checkpoint=mode)
        group = dims.mesh["tensor"].get_group().group_name if layout.n_tensor > 1 else ""
        yield model, own_part(batches(0, packed), dims)[:1], group
    finally:
        dist.destroy_process_group()


@contextmanager
def recorded() -> Iterator[list[tuple[str, Share, int]]]:
    """(kind, ranks, bytes of the input) of all that is exchanged meanwhile. Not by a dispatch mode, as the estimate
    does, which cannot look inside torch.func.vjp of tensors with data."""
    found: list[tuple[str, Share, int]] = []

    def recording(kind: str, exchange: Any) -> Any:
        def record(x: torch.Tensor, *args: Any) -> torch.Tensor:
            found.append((kind, args[-1], x.nbytes))
            return exchange(x, *args)  # type: ignore[no-any-return]

        return record

    with pytest.MonkeyPatch.context() as patch:
        for name, kind in (("_sum", "all-reduce"), ("_gather", "all-gather"), ("_sum_and_split", "reduce-scatter")):
            patch.setattr(shares, name, recording(kind, getattr(shares, name)))
        patch.setattr(parallel_head, "maximum", recording("all-reduce", parallel_head.maximum))
        yield found


def counted(layout: Layout, shape: ModelConfig, mode: str, packed: bool, **loops: int) -> dict[str, Sent]:
    with split(layout, shape, mode, packed) as (model, part, tensor_group), recorded() as found:
        loss_of(model, part, **loops).backward()
    parts = []
    for kind, share, n_bytes in found:
        others = share.n_ranks - 1
        sent = {
            "all-gather": n_bytes * others,
            "reduce-scatter": n_bytes * others // share.n_ranks,
            "all-reduce": 2 * n_bytes * others // share.n_ranks,
        }
        axis = "tensor" if share.group == tensor_group else "context"
        parts.append({f"{kind} over {axis} ranks": Sent(1, sent[kind])})
    return together(*parts)


def estimated(
    layout: Layout, shape: ModelConfig, mode: str, packed: bool, n_loops: int = 3, n_backward_loops: int = 0
) -> dict[str, Sent]:
    core = estimated_activations(shape, layout, mode, packed=packed, n_loops=n_loops, n_backward_loops=n_backward_loops)
    ends = of_ends(
        build_on_meta(shape, "reference"),
        layout,
        n_tokens=2 * LENGTH // layout.n_context,
        dtype=DTYPE,
        n_microbatches=1,
        is_truncated=n_backward_loops > 0,
    )
    return together(core, ends)


def check(layout: Layout, shape: ModelConfig, mode: str = "none", packed: bool = False, **loops: int) -> None:
    expected = counted(layout, shape, mode, packed, **loops)
    assert expected
    assert estimated(layout, shape, mode, packed, **loops) == expected


LAYOUTS = {
    "tensor": Layout(n_tensor=2, sequence_parallel=True),
    "tensor, whole residual stream": Layout(n_tensor=2, sequence_parallel=False),
    "context": Layout(n_context=2),
    "context and tensor": Layout(n_context=2, n_tensor=2, sequence_parallel=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["none", "block", "loop", "nested"])
def test_checkpointing_modes(layout: str, mode: str) -> None:
    check(LAYOUTS[layout], config("gdn", "full"), mode)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixer", MixersConfig.names())
def test_mixers(layout: str, mixer: str) -> None:
    check(LAYOUTS[layout], config(mixer), "block")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_that_ranks_share_packed_rows_and_fewer_loops(layout: str) -> None:
    check(LAYOUTS[layout], config("mamba2", mixers=ONE_GROUP))
    check(LAYOUTS[layout], config("gdn", "nsa", mixers=TWO_KEY_HEADS), "block")
    check(LAYOUTS[layout], config("gdn", "full"), "block", packed=True)
    check(LAYOUTS[layout], config("gdn", "full"), "block", n_loops=2, n_backward_loops=1)


def test_the_loss_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (head, communication_estimate):
        monkeypatch.setattr(module, "CHUNK", 7)
    check(LAYOUTS["tensor"], config("full"))


def test_selective_sends_again_what_it_does_not_keep() -> None:
    """By counts of the profiler, below what selective checkpointing answers from its memory. All-reduces are also of
    gradients of whole parameters, as many in every mode."""
    events: dict[str, Counter[str]] = {}
    for mode in ("none", "selective"):
        with split(LAYOUTS["tensor"], config("hgrn2"), mode) as (model, part, _):
            loss_of(model, part).backward()  # whatever is made at first
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                loss_of(model, part).backward()
        assert profiler.profiler is not None
        names = [event.name() for event in profiler.profiler.kineto_results.events()]
        events[mode] = Counter(name for name in names if name.startswith("c10d::"))
    expected = {mode: estimated(LAYOUTS["tensor"], config("hgrn2"), mode, packed=False) for mode in events}
    for kind, part in (("all-gather", "allgather"), ("reduce-scatter", "reduce_scatter"), ("all-reduce", "allreduce")):
        n = {mode: sum(count for name, count in found.items() if part in name) for mode, found in events.items()}
        n_expected = {mode: sent[f"{kind} over tensor ranks"].n_times for mode, sent in expected.items()}
        assert n["selective"] - n["none"] == n_expected["selective"] - n_expected["none"], (kind, n, n_expected)
        if kind != "all-reduce":
            assert n == n_expected, kind
    assert expected["selective"] != expected["none"]


def test_microbatches_multiply() -> None:
    one, three = (
        estimated_activations(config("gdn"), LAYOUTS["context and tensor"], "block", n_microbatches=n) for n in (1, 3)
    )
    assert three == together(one, one, one)
