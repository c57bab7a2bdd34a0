"""Sizes, placements and counts, against the figures of the paper and its reference tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lt2titan.config.loader import load_config
from lt2titan.config.section import ConfigError
from lt2titan.model.config import HybridConfig, LoopConfig, ModelConfig
from lt2titan.model.flops import count_parameters, training_flops_per_token
from lt2titan.model.init import build_on_meta
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, GDNConfig, KDAConfig, Mamba2Config, MixersConfig, RetNetConfig

TRAIN_CONFIGS = Path(__file__).resolve().parents[3] / "train_configs"


def recipe(name: str) -> LT2:
    return build_on_meta(load_config(TRAIN_CONFIGS / name).model, "reference")


def test_flagship_without_output_gate_has_the_published_size() -> None:
    count = count_parameters(recipe("ablations/no_output_gate_1.3b.toml"))
    assert count.total == 1_426_028_032
    assert count.embedding == 262_668_288
    assert sorted(set(count.blocks)) == [51_384_320, 59_863_264]
    assert count.blocks.index(51_384_320) == 4


def test_smaller_model_has_the_published_block_sizes() -> None:
    count = count_parameters(recipe("ablations/no_output_gate_0.6b.toml"))
    assert sorted(set(count.blocks)) == [12_847_104, 14_989_440]
    assert count.embedding == count.head == 131_334_144
    assert round(count.total / 1e6) == 569


@pytest.mark.parametrize(
    ("name", "millions"),
    [("pure_retnet_0.6b", 621), ("pure_retnet_1.3b", 1626), ("pure_mamba2_0.6b", 580), ("pure_mamba2_1.3b", 1465)],
)
def test_pure_stacks_have_the_sizes_of_the_reference_code(name: str, millions: int) -> None:
    assert round(count_parameters(recipe(f"ablations/{name}.toml")).total / 1e6) == millions


def test_swiglu_widths() -> None:
    assert ModelConfig(dim=1024).ffn_width == 2816
    assert ModelConfig(dim=2048).ffn_width == 5632


@pytest.mark.parametrize(
    ("placement", "ratio", "rare"),
    [
        ("interleave", 4, [4, 9, 14, 19]),
        ("bookend", 4, [0, 1, 18, 19]),
        ("front", 4, [0, 1, 2, 3]),
        ("back", 4, [16, 17, 18, 19]),
        ("interleave", 1, list(range(1, 20, 2))),
        ("interleave", 12, [12]),
        ("bookend", 6, [0, 19]),
        ("bookend", 12, [19]),
    ],
)
def test_placements(placement: str, ratio: int, rare: list[int]) -> None:
    hybrid = HybridConfig(mixer="full", ratio=ratio, placement=placement)  # type: ignore[arg-type]
    mixers = ModelConfig(n_layers=20, hybrid=hybrid).layer_mixers
    assert [i for i, name in enumerate(mixers) if name == "full"] == rare


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ModelConfig(mixers=MixersConfig(gdn=GDNConfig(n_heads=5))),
            r"mixers\.gdn\.n_heads = 5.*\[1, 2, 3, 4, 6",
        ),
        (
            ModelConfig(dim=64, mixer="kda", mixers=MixersConfig(kda=KDAConfig(n_heads=5))),
            r"mixers\.kda\.n_heads = 5: does not divide dim 64; these do: \[1, 2, 4, 8, 16, 32, 64\]",
        ),
        (
            ModelConfig(dim=64, mixer="kda", mixers=MixersConfig(kda=KDAConfig(lower_bound=-6.0))),
            r"mixers\.kda\.lower_bound = -6\.0: must lie in \[-5, 0\)",
        ),
        (
            ModelConfig(dim=96, mixer="rwkv7"),
            r"mixers\.rwkv7\.head_dim = 64: does not divide dim 96; these do: \[1, 2, 3, 4, 6",
        ),
        (
            ModelConfig(mixer="full", mixers=MixersConfig(full=FullConfig(n_heads=128))),
            r"full\.n_heads = 128",
        ),
        (
            ModelConfig(mixer="full", mixers=MixersConfig(full=FullConfig(n_kv_heads=3))),
            r"n_kv_heads = 3.*\[1, 2, 4, 8, 16\]",
        ),
        (
            ModelConfig(mixer="retnet", mixers=MixersConfig(retnet=RetNetConfig(n_heads=128))),
            r"mixers\.retnet\.n_heads = 128.*odd head widths.*: \[1, 2, 4, 8, 16, 32, 64\]",
        ),
        (
            ModelConfig(mixer="retnet", mixers=MixersConfig(retnet=RetNetConfig(n_heads=3))),
            r"retnet\.n_heads = 3: does not divide the width 256 of expand_v",
        ),
        (
            ModelConfig(mixer="mamba2", mixers=MixersConfig(mamba2=Mamba2Config(n_groups=3))),
            r"mamba2\.n_groups = 3: does not divide n_heads 16; these do: \[1, 2, 4, 8, 16\]",
        ),
        (
            ModelConfig(mixer="mamba2", mixers=MixersConfig(mamba2=Mamba2Config(n_heads=3))),
            r"mamba2\.n_heads = 3: does not divide the width 256 of expand",
        ),
        (ModelConfig(mixer="gdm"), "mixer = 'gdm'"),
        (
            ModelConfig(n_layers=4, hybrid=HybridConfig(mixer="full")),
            r"hybrid\.ratio = 4: 4 layers hold no rare",
        ),
        (ModelConfig(mixer="full", loop=LoopConfig(windows=[1, 2])), r"loop\.windows.*n_loops is 4"),
        (ModelConfig(loop=LoopConfig(windows=[1, 2, 3, 4])), "no softmax layer"),
        (ModelConfig(mixer="full", loop=LoopConfig(windows=[0, 2, 3, 4])), "-1 for full"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_those_that_would(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.validate()


def test_flops_of_the_flagship_by_hand() -> None:
    """6 (T blocks + head) + 6 L d per softmax layer executed: the convention of the published measurements."""
    blocks = 16 * 59_863_264 + 4 * 51_384_320
    expected = 6 * (4 * blocks + 262_668_288) + 6 * 4096 * 2048 * 4 * 4
    assert training_flops_per_token(recipe("ablations/no_output_gate_1.3b.toml"), 4096).model == expected


def test_flops_of_windows_count_the_tokens_inside() -> None:
    model = recipe("ablations/loop_coarse_to_fine_1.3b.toml")
    full = recipe("lt2_1.3b.toml")
    difference = training_flops_per_token(full, 4096).model - training_flops_per_token(model, 4096).model
    # Keys that a token sees on average: all of the causal triangle, less what lies beyond the window.
    pairs = [
        sum(min(i, w) - 0.5 for i in range(1, 4097)) / 4096 for w in (4096, 512, 256, 128)
    ]  # the diagonal counts half, as in L / 2
    expected = sum(12 * 2048 * 4 * (pairs[0] - p) for p in pairs)
    assert difference == pytest.approx(expected, rel=2e-3)


def test_flops_agree_with_counting_what_torch_executes() -> None:
    config = ModelConfig(vocab_size=512, dim=64, n_layers=2, n_loops=3, mixer="full", tie_embeddings=False)
    model = build_on_meta(config, "reference")
    tokens = torch.zeros(2, 128, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens).backward()
    ours = training_flops_per_token(model, 128).model * tokens.numel()
    # torch counts all pairs of tokens, not the causal half; norms are parameters without a product.
    attention = 6 * config.n_loops * config.n_layers * 128 * config.dim * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(ours + attention, rel=0.02)


@pytest.mark.parametrize(
    ("mixer", "mixers", "width"),
    [
        ("gdn", MixersConfig(gdn=GDNConfig(n_heads=1)), 384),
        ("mamba2", MixersConfig(mamba2=Mamba2Config(state_size=257)), 257),
        ("retnet", MixersConfig(retnet=RetNetConfig(n_heads=1)), 512),
    ],
)
def test_key_heads_too_wide_for_fla_are_refused_before_the_first_step(
    mixer: str, mixers: MixersConfig, width: int
) -> None:
    config = ModelConfig(dim=512, mixer=mixer, mixers=mixers)
    build_on_meta(config, "reference")
    with pytest.raises(ConfigError, match=rf"^kernels.backend = 'fla': .*256 wide.*model.mixers.{mixer} have {width}"):
        build_on_meta(config, "fla")


def test_key_heads_of_the_recipes_fit_fla() -> None:
    for path in sorted(TRAIN_CONFIGS.rglob("*.toml")):
        build_on_meta(load_config(path).model, "fla")
