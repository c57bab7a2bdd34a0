"""Checkpointing of compiled blocks: the same gradients, the memory that was predicted, within the budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checkpoint_models import EXECUTIONS, N_LOOPS, batch, build, core_inputs, executions, gradients, saved_bytes
from inductor_graphs import inductor_without_kernels

from lt2titan.model.lt2 import LT2
from lt2titan.parallel.activation_checkpoint import apply_activation_checkpoint, recompute_plan
from lt2titan.parallel.activation_memory import core_memory


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    apply_activation_checkpoint(build("full"), "none")  # the budget is torch's, for the whole process


def compiled(name: str, mode: str, backend: Any = "aot_eager", **options: Any) -> LT2:
    model = build(name)
    apply_activation_checkpoint(model, mode, is_compiled=True, **options)
    for block in model.core.blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    return model


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "mode",
    [
        "selective",
        "nested",
        *(pytest.param(mode, marks=pytest.mark.wide) for mode in ("block", "loop", "memory_budget")),
    ],
)
def test_compiled_blocks(mode: str) -> None:
    """The gradients of none; and an operator that is to be kept runs once in compiled blocks too."""
    expected = gradients(build("rwkv7+full"), batch())
    model = compiled("rwkv7+full", mode)
    got = gradients(model, batch())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5 * value.abs().max().item())
    with executions() as counts:
        gradients(model, batch())
    if mode != "memory_budget":  # there it is torch's choice
        assert counts["dplr_delta_rule"] == 2 * N_LOOPS * EXECUTIONS[mode]


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_memory_budget_is_kept() -> None:
    """Less is saved the smaller the budget; without any, the inputs of the blocks and what they share, as in mode
    block. Gradients stay as they are without one, bit for bit."""
    saved, all_gradients = [], []
    for budget in (1.0, 0.5, 0.0):
        torch._dynamo.reset()
        model = compiled("full", "memory_budget", memory_budget=budget)
        all_gradients.append(gradients(model, batch()))  # compiles; the budget is divided up then
        h, context = core_inputs(model, batch())
        saved.append(saved_bytes(model, h, context))
    sizes = core_memory(model, batch_size=2, length=24, dtype=torch.float32)
    everything, least = (sizes.under(recompute_plan(mode, 0)).kept for mode in ("none", "block"))
    assert everything > saved[0] > saved[1] > saved[2]
    assert all(torch.equal(g[name], value) for g in all_gradients[1:] for name, value in all_gradients[0].items())
    assert saved[2] == least - context.positions.nbytes


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("name", "mode", "budget"),
    [
        ("full", "memory_budget", 0.5),
        ("gdn+full", "memory_budget", 0.3),
        ("full", "selective", 1.0),
        pytest.param("gdn+full", "selective", 1.0, marks=pytest.mark.wide),
        pytest.param("gdn+full", "memory_budget", 0.7, marks=pytest.mark.wide),
    ],
)
def test_compiled_blocks_save_what_is_predicted(name: str, mode: str, budget: float) -> None:
    """Byte for byte, with the partitioner of inductor, which the prediction asks."""
    model = compiled(name, mode, inductor_without_kernels, **({"memory_budget": budget} if budget < 1 else {}))
    gradients(model, batch())  # compiles
    h, context = core_inputs(model, batch())
    found = saved_bytes(model, h, context)
    sizes = core_memory(
        build(name), batch_size=2, length=24, dtype=torch.float32, is_compiled=True, memory_budget=budget
    )
    plan = recompute_plan("none" if mode == "memory_budget" else mode, 0)
    assert sizes.under(plan).kept == found + context.positions.nbytes  # which autograd does not need
