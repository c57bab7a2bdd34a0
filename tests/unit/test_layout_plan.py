"""What "auto" comes to: the first of the policies whose estimated peak fits."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lt2titan.config.job import JobConfig
from lt2titan.config.loader import load_config
from lt2titan.layout_plan import USABLE, choose, core_of, estimate_memory, plan_layout
from lt2titan.model.init import build_on_meta
from lt2titan.parallel.layout import Layout

RECIPE = Path(__file__).resolve().parents[2] / "train_configs" / "lt2_1.3b.toml"
PEAKS = {("per_step", False): 8, ("per_pass", False): 6, ("per_visit", False): 4}
PEAKS |= {(policy, True): peak + 4 for (policy, _), peak in PEAKS.items()}


def chosen(usable: int, **changes: Any) -> tuple[str, bool]:
    def peak(layout: Layout) -> int:
        return PEAKS[layout.loop_reshard, layout.defers_reductions]

    options: dict[str, Any] = {"loop_reshard": "auto", "defer_reductions": "auto", "can_defer": True}
    layout = choose(Layout(n_shards=8), peak, usable=usable, **{**options, **changes})
    assert layout.n_shards == 8
    return layout.loop_reshard, layout.defers_reductions


def test_auto_follows_memory() -> None:
    """Gathering less often comes before reducing less often."""
    assert [chosen(usable) for usable in (12, 11, 8, 7, 6, 5, 4, 0)] == [
        ("per_step", True),
        ("per_step", False),
        ("per_step", False),
        ("per_pass", False),
        ("per_pass", False),
        ("per_visit", False),
        ("per_visit", False),
        ("per_visit", False),
    ]


def test_what_is_configured_is_done() -> None:
    assert chosen(12, loop_reshard="per_visit") == ("per_visit", True)
    assert chosen(0, loop_reshard="per_step") == ("per_step", False)
    assert chosen(0, defer_reductions="on") == ("per_visit", True)
    assert chosen(10, defer_reductions="on") == ("per_pass", True)  # per_step would fit were they not deferred
    assert chosen(12, defer_reductions="off") == ("per_step", False)
    assert chosen(12, defer_reductions="on", can_defer=False) == ("per_step", False)


@pytest.fixture(scope="module")
def recipe() -> JobConfig:
    config = load_config(RECIPE)
    return replace(config, training=replace(config.training, global_batch_size=64, local_batch_size=4))


def planned(config: JobConfig, gib: float, n_ranks: int = 8) -> Layout:
    model = build_on_meta(config.model, "fla")
    return plan_layout(config, model, n_ranks, torch.bfloat16, int(gib * 2**30))


def test_the_1_3b_recipe_is_planned_with_its_activations(
    recipe: JobConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lt2titan"), "propagate", True)
    with caplog.at_level(logging.INFO, "lt2titan"):
        assert planned(recipe, 139) == Layout(n_shards=8, loop_reshard="per_step", defers_reductions=True)
    assert "fsdp_loop_reshard = per_step (auto), reductions deferred" in caplog.text
    # As much for weights and gradients, but all activations of four rows: gathered parameters have to give way.
    keeps_all = replace(recipe, activation_checkpoint=replace(recipe.activation_checkpoint, mode="none"))
    assert planned(keeps_all, 139).loop_reshard == "per_visit"
    assert "lower training.local_batch_size" in caplog.text


def test_memory_between_two_estimates_decides(
    recipe: JobConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so few activations that every policy has a peak of its own."""
    monkeypatch.setattr(logging.getLogger("lt2titan"), "propagate", True)
    recipe = replace(recipe, training=replace(recipe.training, local_batch_size=1, seq_len=2048))
    model, layout = build_on_meta(recipe.model, "fla"), Layout(n_shards=8)
    core = core_of(recipe, model, layout, torch.bfloat16)
    peaks = {
        policy: estimate_memory(recipe, model, layout._replace(loop_reshard=policy), core, torch.bfloat16)["peak"]
        for policy in ("per_step", "per_pass", "per_visit")
    }
    assert peaks["per_step"] > peaks["per_pass"] > peaks["per_visit"]
    for policy, peak in peaks.items():
        assert planned(recipe, 1.001 * peak / USABLE / 2**30).loop_reshard == policy
    assert "lower training.local_batch_size" not in caplog.text
    assert planned(recipe, 0.999 * peaks["per_visit"] / USABLE / 2**30).loop_reshard == "per_visit"
    assert "lower training.local_batch_size" in caplog.text


def test_compiled_blocks_are_planned_as_the_compiler_divides_them(
    recipe: JobConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager, everything would be kept under memory_budget, and not fit."""
    monkeypatch.setattr(logging.getLogger("lt2titan"), "propagate", True)
    budget = replace(recipe.activation_checkpoint, mode="memory_budget")
    compiled = replace(recipe, activation_checkpoint=budget, compile=replace(recipe.compile, enable=True))
    with caplog.at_level(logging.INFO, "lt2titan"):
        assert planned(compiled, 139) == Layout(n_shards=8, loop_reshard="per_step", defers_reductions=True)
    assert "of compiled blocks" in caplog.text and "lower training" not in caplog.text
