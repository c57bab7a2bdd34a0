"""Sizes of native sparse attention, its FLOPs and parameters, and what the GPU kernels do not take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_zoo import ZOO, build

from lt2titan.config.loader import load_config
from lt2titan.config.section import ConfigError
from lt2titan.model.config import ModelConfig
from lt2titan.model.flops import count_parameters
from lt2titan.model.init import build_on_meta
from lt2titan.model.mixers.base import Common
from lt2titan.model.mixers.config import MixersConfig, NSAConfig
from lt2titan.model.mixers.nsa import NSA
from lt2titan.model.state import allocate

ROOT = Path(__file__).resolve().parents[3]


def test_defaults_are_those_of_the_paper() -> None:
    nsa = NSAConfig()
    assert (nsa.n_heads, nsa.n_kv_heads, nsa.block_size, nsa.n_blocks, nsa.window) == (16, 1, 64, 16, 512)


@pytest.mark.parametrize("dim", [1024, 2048])
def test_parameter_count(dim: int) -> None:
    """Queries and outputs dim^2 each, one key and one value head, three gates for each of 16 heads."""
    config = ModelConfig(dim=dim, n_layers=1, mixer="nsa")
    (block,) = count_parameters(build_on_meta(config, "reference")).blocks
    assert block == 2 * dim**2 + 2 * dim * dim // 16 + 48 * dim + 3 * dim * config.ffn_width + 2 * dim


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NSAConfig(n_heads=3), r"mixers\.nsa\.n_heads = 3: .*\[1, 2, 4"),
        (NSAConfig(n_kv_heads=3), r"mixers\.nsa\.n_kv_heads = 3: .*\[1, 2, 4, 8, 16\]"),
        (NSAConfig(n_blocks=2), r"mixers\.nsa\.n_blocks = 2: must be at least 3"),
        (NSAConfig(block_size=0), r"mixers\.nsa\.block_size = 0: must be positive"),
        (NSAConfig(window=0), r"mixers\.nsa\.window = 0: must be positive"),
    ],
)
def test_sizes_that_cannot_work_are_refused(config: NSAConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(dim=64, mixer="nsa", mixers=MixersConfig(nsa=config)).validate()


@pytest.mark.parametrize(
    ("dim", "config", "message"),
    [
        (
            1024,
            NSAConfig(n_heads=256),
            r"nsa\.n_kv_heads = 1: makes 256 query heads .* up to 64; use at least 4, or set",
        ),
        (2048, NSAConfig(n_heads=4), r"nsa\.n_heads = 4: .* 256 wide, not 512; use at least 8 heads"),
        (256, NSAConfig(block_size=48), r"nsa\.block_size = 48: .* 16, 32, 64 or 128 tokens; take one, or set"),
    ],
)
def test_what_the_gpu_kernels_do_not_take_is_refused_with_what_would_fit(
    dim: int, config: NSAConfig, message: str
) -> None:
    config.validate(dim)
    NSA(config, Common(dim, 1e-5, True, "reference"))
    with pytest.raises(ConfigError, match=message):
        NSA(config, Common(dim, 1e-5, True, "fla"))


@pytest.mark.parametrize("length", [700, 4096, 32768])
def test_flops_count_the_keys_that_are_seen(length: int) -> None:
    config = NSAConfig()
    mixer = NSA(config, Common(2048, 1e-5, True, "reference"))
    size, n_keys = config.block_size, 0
    for i in range(length):
        own = i // size
        n_selected = i + 1 if own < config.n_blocks else (config.n_blocks - 1) * size + i % size + 1
        n_keys += (i + 1) // size + n_selected + min(i + 1, config.window)
    expected = 4 * 16 * 128 * n_keys / length
    assert mixer.attention_flops(length, None) == pytest.approx(expected, rel=4e-3)
    assert mixer.attention_flops(length, 128) == mixer.attention_flops(length, None)  # the loop's window is not its own


def test_the_decode_state_holds_keys_values_and_their_means() -> None:
    model = build(ZOO["nsa"])
    state = allocate(model, 3, 51, torch.bfloat16, "meta")
    width, loops_and_layers = 4, 3 * 2
    assert state.n_bytes == 3 * loops_and_layers * (51 + 26) * 2 * width * 2


def test_choices_of_blocks_reach_the_logits() -> None:
    """Of thirty tokens in blocks of two, four blocks a query: with room for all of them the model is another."""
    config = ZOO["nsa"]
    wide = replace(config, mixers=replace(config.mixers, nsa=replace(config.mixers.nsa, n_blocks=15)))
    tokens = torch.arange(30).remainder(19).view(1, -1)
    few, all_of_them = build(config)(tokens), build(wide)(tokens)
    torch.testing.assert_close(few[:, :8], all_of_them[:, :8])
    assert (few[:, 9:] - all_of_them[:, 9:]).abs().amax(dim=-1).min() > 1e-6


def test_the_estimate_of_a_state_grows_by_the_mean_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from estimate import estimate

    state = estimate(load_config(ROOT / "train_configs/ablations/pure_nsa_1.3b.toml"))["decode_state_bytes"]
    n_visits, token = 20 * 4, 2 * 128 * 2  # a key and a value of one head in bf16
    assert state["per_token"] == n_visits * token * (1 + 1 / 64) and state["constant"] == 0
