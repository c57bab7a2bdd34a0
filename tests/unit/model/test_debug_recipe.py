"""`--model.mixer <name>` on the debug recipe: every mixer fits its sizes and learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lt2titan.config.loader import load_config
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.mixers.config import MixersConfig

RECIPE = Path(__file__).resolve().parents[3] / "train_configs" / "lt2_debug.toml"


@pytest.mark.parametrize("mixer", MixersConfig.names())
def test_every_mixer_learns_on_the_debug_recipe(mixer: str) -> None:
    config = load_config(RECIPE, ["--model.mixer", mixer])
    assert config.model.layer_mixers == [mixer] * 4 + ["full"]
    assert bool(config.warnings()) == (mixer == "full")  # which then is no hybrid, and says so
    model = build_on_meta(config.model, "reference")
    materialise(model, torch.device("cpu"), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor([list(b"A looped model visits its layers more than once. " * 4)])  # 196 bytes
    losses = []
    for _ in range(12):
        loss = model(text[:, :-1], targets=text[:, 1:]) / (text.numel() - 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0, losses
