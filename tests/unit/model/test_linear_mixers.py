"""Sizes, parameter counts and initial values of GLA, HGRN2 and DeltaNet."""

from __future__ import annotations

import pytest
import torch

from lt2titan.config.section import ConfigError
from lt2titan.model.config import ModelConfig
from lt2titan.model.flops import count_parameters
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.mixers.config import DeltaNetConfig, GDNConfig, GLAConfig, HGRN2Config, MixersConfig


@pytest.mark.parametrize(
    ("mixers", "dim", "message"),
    [
        (
            MixersConfig(gla=GLAConfig(n_heads=3)),
            64,
            r"mixers\.gla\.n_heads = 3: does not divide the width 32 .*\[1, 2",
        ),
        (MixersConfig(gla=GLAConfig(expand_k=0.3)), 64, r"mixers\.gla\.expand_k = 0\.3: .*not a whole width"),
        (MixersConfig(gla=GLAConfig(decay_rank=0)), 64, r"mixers\.gla\.decay_rank = 0: must be positive"),
        (MixersConfig(hgrn2=HGRN2Config(n_heads=6)), 64, r"mixers\.hgrn2\.n_heads = 6: .*dim 64; these do: \[1, 2, 4"),
        (MixersConfig(deltanet=DeltaNetConfig(n_heads=5)), 64, r"deltanet\.n_heads = 5: .*64 of expand_k.*\[1, 2, 4"),
        (MixersConfig(deltanet=DeltaNetConfig(expand_v=0)), 64, r"deltanet\.expand_v = 0: "),
        (MixersConfig(deltanet=DeltaNetConfig(conv_size=1)), 64, r"deltanet\.conv_size = 1: must be at least 2 taps"),
        (MixersConfig(gdn=GDNConfig(n_heads=1, n_v_heads=5)), 64, r"gdn\.n_v_heads = 5: .*width 96 of expand_v"),
    ],
)
def test_sizes_that_do_not_fit_say_which_would(mixers: MixersConfig, dim: int, message: str) -> None:
    name = message.replace("mixers\\.", "").split("\\")[0]
    with pytest.raises(ConfigError, match=message):
        ModelConfig(dim=dim, mixer=name, mixers=mixers).validate()


@pytest.mark.parametrize("dim", [1024, 2048])
@pytest.mark.parametrize(
    ("mixer", "n_beside"),
    [
        # What comes on top of four square matrices: decays or writing strengths, convolutions, norms.
        ("gla", lambda dim: 16 * dim + 16 * dim // 2 + dim // 2 + dim // 4),
        ("hgrn2", lambda dim: dim),
        ("deltanet", lambda dim: 16 * dim + 3 * 4 * dim + dim // 16),
    ],
)
def test_parameter_counts_at_the_reference_sizes(mixer: str, dim: int, n_beside) -> None:
    """All three spend 4 dim^2, like multi-head attention."""
    config = ModelConfig(dim=dim, n_layers=1, mixer=mixer)
    (block,) = count_parameters(build_on_meta(config, "reference")).blocks
    assert block == 4 * dim**2 + n_beside(dim) + 3 * dim * config.ffn_width + 2 * dim


def test_initial_values() -> None:
    values = {}
    for mixer in ("gla", "hgrn2", "deltanet"):
        model = build_on_meta(ModelConfig(dim=256, n_layers=1, mixer=mixer), "reference")
        materialise(model, torch.device("cpu"), seed=1)
        values |= {f"{mixer}.{name}": p.detach() for name, p in model.core.blocks[0].mixer.named_parameters()}
    for name, value in values.items():
        if name.endswith("o_norm"):
            assert (value == 1).all(), name
        elif name == "gla.a_bias":
            assert (value == 0).all()
        elif name.endswith("_conv"):
            assert 0.45 < value.abs().max() <= 0.5, name
        else:
            fan_in = value.shape[1]
            assert value.std().item() == pytest.approx(0.987 * fan_in**-0.5, rel=0.1), name
