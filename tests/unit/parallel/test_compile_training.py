"""Compiled training against eager training: values, and how many graphs there are."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import lt2titan.model.head
from lt2titan.data.device import model_inputs
from lt2titan.data.packing import BatchLayout, Piece
from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.model.config import HybridConfig, LoopConfig, ModelConfig
from lt2titan.model.head import chunk_loss_sum, loss_sum
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import DSAConfig, FullConfig, GDNConfig, MixersConfig
from lt2titan.parallel.activation_checkpoint import apply_activation_checkpoint
from lt2titan.parallel.compile import RecompileError, RecompileWatch, apply_compile

CPU = torch.device("cpu")
LENGTH = 24
CONFIG = ModelConfig(
    vocab_size=19,
    dim=16,
    n_layers=3,
    n_loops=3,
    ffn_dim=24,
    mixer="gdn",
    hybrid=HybridConfig(mixer="full", ratio=2),
    mixers=MixersConfig(full=FullConfig(n_heads=4), gdn=GDNConfig(n_heads=2)),
)
SOFTMAX = replace(CONFIG, mixer="full", hybrid=HybridConfig(), n_layers=2)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    yield
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits
    torch._C._dynamo.eval_frame._set_lru_cache(True)
    torch._dynamo.reset()


def build(config: ModelConfig, dtype: torch.dtype = torch.float64) -> LT2:
    model = build_on_meta(config, "reference")
    materialise(model, CPU, seed=1)
    return model.to(dtype)


def compiled(config: ModelConfig, backend: str = "aot_eager", mode: str = "none", skip_last_loops: int = 0) -> LT2:
    model = build(config)
    apply_activation_checkpoint(model, mode, skip_last_loops=skip_last_loops, is_compiled=True)
    apply_compile(model, backend)
    return model


def packed(*lengths: int) -> dict[str, Any]:
    """Documents in one row; as many boundaries whatever their number."""
    rng = torch.Generator().manual_seed(len(lengths))
    layout = BatchLayout(seq_len=LENGTH, document_mask=True, max_documents_per_sample=4)
    pieces = [Piece(torch.randint(0, 19, (n,), generator=rng).numpy(), True, 1.0) for n in lengths]
    return model_inputs(layout.assemble([pieces]), CPU)


def step(model: LT2, batch: dict[str, Any], **loops: int) -> dict[str, Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**batch, **loops)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def n_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


BATCHES = [packed(5, 19), packed(1, 2, 20, 1), packed(24)]


def test_graphs_do_not_depend_on_the_number_of_loops() -> None:
    """One for a block and one for the loss, forward and backward."""
    counted = []
    for n_loops in (1, 2, 4, 8):
        torch._dynamo.reset()
        model = compiled(replace(SOFTMAX, n_loops=n_loops))
        before = n_graphs()
        RecompileWatch(False).warm_up(model, BATCHES[0], None, [(n_loops, n_loops)])
        counted.append(n_graphs() - before)
    assert counted == [2, 2, 2, 2]


@pytest.mark.parametrize("n_backward_loops", [0, 2])
def test_steps_of_any_number_of_loops_use_the_graphs_of_the_warm_up(n_backward_loops: int) -> None:
    model, eager = compiled(CONFIG), build(CONFIG)
    watch, before = RecompileWatch(True), n_graphs()
    loops = [(n, min(n_backward_loops or n, n)) for n in (1, 2, 3)]
    watch.warm_up(model, BATCHES[0], BATCHES[0], loops)
    assert n_graphs() - before == 2 * (2 + 1)  # two kinds and the loss, with gradients and without
    assert all(p.grad is None for p in model.parameters())
    with watch.watching():
        for i, (n, k) in enumerate(loops):
            batch = BATCHES[i]
            same(step(model, batch, n_loops=n, n_backward_loops=k), step(eager, batch, n_loops=n, n_backward_loops=k))
            watch.check(i)
        with torch.no_grad():
            same(model(**BATCHES[1]), eager(**BATCHES[1]))


def test_a_window_per_loop_with_truncated_gradients_warms_up_every_number_of_loops() -> None:
    """With n loops, gradients begin at loop n, and each loop has a window of its own."""
    config = replace(SOFTMAX, loop=LoopConfig(windows=[-1, 7, 3]))
    model, eager, watch = compiled(config), build(config), RecompileWatch(True)
    before = n_graphs()
    watch.warm_up(model, BATCHES[0], BATCHES[0], [(n, 1) for n in (1, 2, 3)])
    assert n_graphs() - before == 2 * (3 + 1)
    with watch.watching():
        for n in (2, 1, 3):
            same(
                step(model, BATCHES[1], n_loops=n, n_backward_loops=1),
                step(eager, BATCHES[1], n_loops=n, n_backward_loops=1),
            )
            watch.check(n)


def test_choosing_keys_anew_in_some_loops_warms_up_every_number_of_loops() -> None:
    """With n loops, gradients begin at loop n: the second of 2 reuses what it sees, the third of 3 chooses anew."""
    dsa = DSAConfig(n_heads=2, top_k=3, n_index_heads=2, index_head_dim=6, reuse_every=2)
    config = replace(SOFTMAX, mixer="dsa", mixers=replace(SOFTMAX.mixers, dsa=dsa))
    model, watch = compiled(config), RecompileWatch(True)
    watch.warm_up(model, BATCHES[0], None, [(n, 1) for n in (2, 3)])
    with watch.watching():
        for n in (2, 3):
            step(model, BATCHES[1], n_loops=n, n_backward_loops=1)
            watch.check(n)


@pytest.mark.parametrize(
    ("mode", "skip_last_loops"),
    [
        ("selective", 0),
        ("selective", 1),
        ("nested", 1),
        *(pytest.param(mode, 0, marks=pytest.mark.wide) for mode in ("block", "loop", "memory_budget")),
    ],
)
def test_recomputation_of_compiled_blocks(mode: str, skip_last_loops: int) -> None:
    model, eager = compiled(CONFIG, mode=mode, skip_last_loops=skip_last_loops), build(CONFIG)
    watch = RecompileWatch(True)
    watch.warm_up(model, BATCHES[0], BATCHES[0], [(3, 3)])
    # Two kinds and the loss, with gradients and without. Mode selective is within a block's graph: the loops that it
    # leaves out need another with gradients.
    assert watch.n_warm_up_graphs == 2 * (2 + 1) + (2 if mode == "selective" and skip_last_loops else 0)
    with watch.watching():
        for batch in BATCHES[1:]:
            same(step(model, batch), step(eager, batch))
            watch.check(1)


def test_what_is_compiled_later_is_refused_or_said(caplog: pytest.LogCaptureFixture) -> None:
    batch = dict(BATCHES[0])
    longer = torch.cat([batch["cu_seqlens"], batch["cu_seqlens"][-1:]])
    more_room = {**batch, "cu_seqlens": longer, "chunk_indices": make_chunk_indices(longer)}
    model = compiled(SOFTMAX)
    strict, lenient = RecompileWatch(True), RecompileWatch(False)
    strict.warm_up(model, batch, None, [(3, 3)])
    says = r"(?s)forward.*cu_seqlens.*size mismatch.*data.max_documents_per_sample"
    with pytest.raises(RecompileError, match=says), strict.watching():
        step(model, more_room)
    lenient.warm_up(model, batch, None, [(3, 3)])
    with caplog.at_level(logging.WARNING, logger="lt2titan"), lenient.watching():
        lenient.check(6)
        assert "lt2titan" not in caplog.text
        got = step(model, more_room)
        lenient.check(7)
    assert "step 7 compiled 1 graphs more" in caplog.text and "cu_seqlens" in caplog.text
    same(got, step(build(SOFTMAX), more_room))
    # What another thread compiled, strict settings there or not.
    with pytest.raises(RecompileError, match="step 7 compiled 1 graphs more"):
        strict.check(7)
    strict.check(8)


def test_compiled_loss_keeps_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lt2titan.model.head, "CHUNK", 8)
    model = compiled(SOFTMAX)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=g, requires_grad=True) for n in (29, 50))
    targets = torch.randint(0, 50, (29,), generator=g)
    targets[3:11] = -100
    saved: list[int] = []

    def remember(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    values = []
    for of_chunk in (model.chunk_loss, chunk_loss_sum):
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
            loss = loss_sum(hidden, weight, targets, of_chunk)
        values.append((loss.detach(), *torch.autograd.grad(loss, [hidden, weight])))
    torch.testing.assert_close(*values)
    expected = torch.nn.functional.cross_entropy((hidden @ weight.T).double(), targets, reduction="sum")
    torch.testing.assert_close(values[0][0].double(), expected.detach())
    assert max(saved, default=0) < 8 * 50


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_inductor_on_cpu() -> None:
    config = replace(SOFTMAX, n_loops=2)
    models = compiled(config, "inductor"), build(config)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in models]
    for batch in (*BATCHES, BATCHES[0]):
        same(*(step(model, batch) for model in models))
        for optimizer in optimizers:
            optimizer.step()
