"""What tensor- and context-parallel ranks send in a step: counted as split models run, against the estimate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from counted_collectives import collectives
from split_models import (
    FOUR_HEADS,
    LAYOUTS,
    ONE_GROUP,
    ONE_KEY_HEAD,
    TWO_KEY_HEADS,
    batches,
    config,
    estimated,
    last_rank,
    loss_of,
    own_part,
    split_model,
)

from lt2titan.model import head, parallel_head, shares
from lt2titan.model.config import LoopConfig, ModelConfig
from lt2titan.model.mixers.config import MixersConfig
from lt2titan.model.shares import Share
from lt2titan.parallel import communication_estimate
from lt2titan.parallel.communication_estimate import Sent, together
from lt2titan.parallel.layout import Layout
from lt2titan.parallel.mesh import ParallelDims

DTYPE = torch.float64


@pytest.fixture(autouse=True)
def in_fp64() -> Iterator[None]:
    torch.set_default_dtype(DTYPE)
    yield
    torch.set_default_dtype(torch.float32)


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


def counted(layout: Layout, shape: ModelConfig, mode: str, packed: bool) -> dict[str, Sent]:
    with last_rank(layout) as dims, recorded() as found:
        tensor_group = dims.mesh["tensor"].get_group().group_name if layout.n_tensor > 1 else ""
        model = split_model(shape, dims, layout.sequence_parallel, activation_checkpoint=mode)
        part = own_part(batches(0, packed), dims)[:1]
        loss_of(model, part, n_backward_loops=shape.loop.backward_loops).backward()
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


def check(layout: Layout, shape: ModelConfig, mode: str = "none", packed: bool = False) -> None:
    expected = counted(layout, shape, mode, packed)
    assert expected
    assert estimated(shape, layout, mode, packed=packed) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["none", "block", "loop", "nested"])
def test_checkpointing_modes(layout: str, mode: str) -> None:
    shape = config("gdn", "full")
    check(LAYOUTS[layout], shape, mode)
    check(LAYOUTS[layout], replace(shape, loop=LoopConfig(residual_gate=False)), mode)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixer", MixersConfig.names())
def test_mixers(layout: str, mixer: str) -> None:
    check(LAYOUTS[layout], config(mixer), "block")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_that_ranks_share_packed_rows_and_truncated_gradients(layout: str) -> None:
    check(LAYOUTS[layout], config("mamba2", mixers=ONE_GROUP))
    check(LAYOUTS[layout], config("gdn", "nsa", mixers=TWO_KEY_HEADS), "block")
    check(LAYOUTS[layout], config("gdn", "dsa", mixers=ONE_KEY_HEAD), "block")
    check(LAYOUTS[layout], config("gdn", "full", tied=False), "block", packed=True)
    check(LAYOUTS[layout], replace(config("gdn", "full"), loop=LoopConfig(backward_loops=1)), "block")


def test_more_ranks() -> None:
    check(Layout(n_tensor=4, sequence_parallel=True), config("gdn", "hgrn2", mixers=FOUR_HEADS), "block")
    check(Layout(n_context=3, n_shards=3), config("gdn", "full"), "block")


def test_the_loss_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (head, communication_estimate):
        monkeypatch.setattr(module, "CHUNK", 7)
    check(LAYOUTS["tensor"], config("full"))


def by_profiler(dims: ParallelDims, mode: str, **options: Any) -> dict[str, int]:
    """How often tensor ranks call each collective, below what selective checkpointing answers from its memory and
    inside of what is compiled. All-reduces are also of gradients of whole parameters, as many in every mode."""
    model = split_model(config("hgrn2"), dims, True, activation_checkpoint=mode, **options)
    part = own_part(batches(0, packed=False), dims)[:1]
    loss_of(model, part).backward()  # whatever is made at first
    counted = collectives(lambda: loss_of(model, part).backward())
    kinds = {"all-gather": "gather", "reduce-scatter": "reduce_scatter", "all-reduce": "all_reduce"}
    return {f"{kind} over tensor ranks": counted[name] for kind, name in kinds.items()}


@pytest.mark.parametrize("backend", ["", "aot_eager"], ids=["eager", "compiled"])
def test_what_is_computed_again_is_sent_again(backend: str) -> None:
    """Unless selective keeps it. Eager blocks that are computed again stop early, compiled ones do not."""
    mp.spawn(_computed_again, args=(backend,), nprocs=1)  # type: ignore[no-untyped-call]  # compiled code knows of groups


def _computed_again(_: int, backend: str) -> None:
    torch.set_default_dtype(DTYPE)
    torch.set_num_threads(1)
    layout, found, expected = LAYOUTS["tensor"], {}, {}
    with last_rank(layout) as dims:
        for mode, skipped in (("none", 0), ("block", 1), ("selective", 0), ("nested", 0)):
            torch._dynamo.reset()
            found[mode] = by_profiler(dims, mode, compile_backend=backend, skip_last_loops=skipped)
            sent = estimated(config("hgrn2"), layout, mode, is_compiled=bool(backend), skip_last_loops=skipped)
            expected[mode] = {name: n.n_times for name, n in sent.items()}
    of_parameters = found["none"]["all-reduce over tensor ranks"] - expected["none"]["all-reduce over tensor ranks"]
    assert of_parameters > 0
    for counts in expected.values():
        counts["all-reduce over tensor ranks"] += of_parameters
    assert found == expected
    assert len({tuple(counts.items()) for counts in found.values()}) == len(found)


def test_microbatches_multiply() -> None:
    one, three = (estimated(config("gdn"), LAYOUTS["context and tensor"], "block", n_microbatches=n) for n in (1, 3))
    assert three == together(one, one, one)


def test_weights_in_float8_change_nothing() -> None:
    """What tensor ranks exchange are activations, which are cast after that."""
    pytest.importorskip("torchao", reason="float8 needs torchao")
    shape, layout = replace(config("gdn", "full"), dim=64, ffn_dim=96), LAYOUTS["context and tensor"]
    expected = estimated(shape, layout, "block", is_compiled=True)
    assert estimated(shape, layout, "block", is_compiled=True, recipe="tensorwise") == expected
