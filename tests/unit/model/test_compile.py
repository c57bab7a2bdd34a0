"""Compiled blocks: whole graphs, few of them, and the eager model's values.

A graph belongs to a block kind, a gradient mode and a static window; neither the loop, nor T, nor where documents end
makes another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_zoo import ZOO, build, small
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.model.block import Block
from lt2titan.model.config import LoopConfig, ModelConfig
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import MixersConfig
from lt2titan.model.mixers.dsa import DSA
from lt2titan.model.mixers.full import Full

KINDS = {name: small(name) for name in MixersConfig.names()}
LENGTH = 24


class Counter:
    """A compiler back end that counts its graphs."""

    def __init__(self) -> None:
        self.n_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.n_graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def compiled(config: ModelConfig, counter: Counter) -> LT2:
    model = build(config)
    for block in model.core.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    return model


def packed(*lengths: int) -> dict[str, Tensor]:
    """Documents in one row; the boundaries always have as many entries."""
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    ends = torch.cat([ends, ends[-1:].repeat(6 - ends.numel())])
    positions = torch.cat([torch.arange(n) for n in lengths]).view(1, -1)
    return {"cu_seqlens": ends, "positions": positions, "chunk_indices": make_chunk_indices(ends)}


def step(model: LT2, batch: dict[str, Tensor], **options: bool) -> dict[str, Tensor]:
    """Loss and gradients."""
    tokens = torch.arange(LENGTH).remainder(19).view(1, -1)
    model.zero_grad()
    loss, auxiliary = model(tokens, targets=tokens, **batch, max_seqlen=LENGTH, with_auxiliary=True, **options)
    sum(auxiliary.values(), loss).backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


BATCHES = [packed(5, 19), packed(1, 2, 20, 1), packed(24)]


@pytest.mark.parametrize("mixer", KINDS)
@pytest.mark.parametrize("n_loops", [1, 3])
def test_one_graph_for_a_stack_of_one_kind(mixer: str, n_loops: int) -> None:
    """Three layers, any number of loops: forward and backward of training are one graph, and validation another."""
    config = replace(KINDS[mixer], n_loops=n_loops, n_layers=3)
    n_kinds = len({block_kind(block) for block in build(config).core.blocks})
    counter = Counter()
    model, eager = compiled(config, counter), build(config)
    got, want = step(model, BATCHES[0]), step(eager, BATCHES[0])
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    assert counter.n_graphs == n_kinds
    with torch.no_grad():
        model(torch.zeros(1, LENGTH, dtype=torch.long), **BATCHES[0], max_seqlen=LENGTH)
    assert counter.n_graphs == 2 * n_kinds
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in BATCHES[1:]:
            torch.testing.assert_close(step(model, batch), step(eager, batch), rtol=1e-8, atol=1e-10)
        with torch.no_grad():
            model(torch.ones(1, LENGTH, dtype=torch.long), **BATCHES[2], max_seqlen=LENGTH)


def block_kind(block: Block) -> tuple[type, frozenset[str]]:
    """The mixer, and which parameters it has: RWKV7's first layer has no mix of first values."""
    return type(block.mixer), frozenset(name for name, _ in block.named_parameters())


@pytest.mark.parametrize("kind", [kind for kind in ZOO if "+" in kind])
def test_a_graph_per_kind_and_window(kind: str) -> None:
    config, counter = ZOO[kind], Counter()
    model, eager = compiled(config, counter), build(config)
    torch.testing.assert_close(step(model, BATCHES[0]), step(eager, BATCHES[0]), rtol=1e-8, atol=1e-10)
    n_windows = len(set(config.loop.windows)) or 1  # only softmax layers read the loop's window
    n_ways = min(model.core.reuse_every, 2)  # to choose keys, and to take over another loop's
    kinds = {block_kind(block) for block in model.core.blocks}
    n_graphs = [n_windows if issubclass(mixer, Full) else n_ways if mixer is DSA else 1 for mixer, _ in kinds]
    assert counter.n_graphs == sum(n_graphs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in BATCHES[1:]:
            torch.testing.assert_close(step(model, batch), step(eager, batch), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["dsa", "gdn+dsa, forced tokens, reuse"])
def test_seeing_everything_is_one_more_way_of_those_that_choose(kind: str) -> None:
    """Both phases of training are known after one step of each: however often they alternate, nothing is compiled."""
    counter = Counter()
    model, eager = compiled(ZOO[kind], counter), build(ZOO[kind])
    step(model, BATCHES[0])
    n_before = counter.n_graphs
    step(model, BATCHES[0], sees_all=True)
    assert counter.n_graphs - n_before == min(model.core.reuse_every, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in BATCHES:
            for sees_all in (False, True):
                got, want = (step(m, batch, sees_all=sees_all) for m in (model, eager))
                torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_each_static_window_is_a_graph() -> None:
    config = small("full", n_loops=4, n_layers=2, loop=LoopConfig(windows=[-1, 6, 6, 3]))
    counter = Counter()
    torch.testing.assert_close(
        step(compiled(config, counter), BATCHES[0]), step(build(config), BATCHES[0]), rtol=1e-8, atol=1e-10
    )
    assert counter.n_graphs == 3
