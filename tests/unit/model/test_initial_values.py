"""Defaults and initial values of the mixers: the rows of the LT2 paper's table (arXiv 2605.20670, appendix C)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.model.config import ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.mixers.config import KDAConfig, MixersConfig

DIM = 256


def parameters(mixer: str, mixers: MixersConfig | None = None) -> dict[str, Tensor]:
    config = ModelConfig(vocab_size=32, dim=DIM, n_layers=2, mixer=mixer, mixers=mixers or MixersConfig())
    model = build_on_meta(config, "reference")
    materialise(model, torch.device("cpu"), seed=0)
    prefix = "core.blocks.1.mixer."
    return {n.removeprefix(prefix): p.detach() for n, p in model.named_parameters() if n.startswith(prefix)}


def assert_between(values: Tensor, low: float, high: float) -> None:
    """Inside, and spread over most of the range."""
    assert low <= values.min() and values.max() <= high
    assert values.max() - values.min() > 0.4 * (high - low)


def test_defaults_are_those_of_the_paper() -> None:
    m = MixersConfig()
    assert (m.full.n_heads, m.window.n_heads, m.window.window) == (16, 16, 2048)
    assert (m.retnet.expand_k, m.retnet.expand_v) == (1, 2)
    assert (m.mamba2.expand, m.mamba2.state_size, m.mamba2.conv_size, m.mamba2.n_groups) == (2, 64, 4, 1)
    assert (m.gla.decay_rank, m.gla.decay_temperature, m.gla.expand_k, m.gla.expand_v) == (16, 16, 0.5, 1)
    assert (m.gdn.expand_k, m.gdn.expand_v, m.gdn.conv_size, m.gdn.allow_neg_eigval) == (0.75, 1.5, 4, False)
    assert (m.deltanet.conv_size, m.kda.conv_size, m.kda.expand_v, m.kda.lower_bound) == (4, 4, 1, -5)
    assert [m.rwkv7.rank(f"{name}_rank", 1024) for name in ("decay", "a", "gate", "v")] == [64, 64, 160, 64]
    assert m.rwkv7.head_dim == 64


@pytest.mark.parametrize(("mixer", "low"), [("gdn", 0.0), ("mamba2", 0.0), ("kda", 1.0)])
def test_decay_rates_and_time_steps(mixer: str, low: float) -> None:
    values = parameters(mixer)
    assert_between(values["A_log"].exp(), low, 16.0)
    dt = F.softplus(values["dt_bias"])
    assert_between(dt.log(), math.log(0.99e-3), math.log(1.01e-1))


def test_the_bounded_gate_of_kda_starts_open() -> None:
    mixers = MixersConfig(kda=KDAConfig(bounded_gate=True))
    assert (parameters("kda", mixers)["A_log"] == 0).all()


def test_neutral_values() -> None:
    assert (parameters("mamba2")["D"] == 1).all()
    assert (parameters("gla")["a_bias"] == 0).all() and (parameters("kda")["gate_bias"] == 0).all()
    for mixer in ("retnet", "mamba2", "gla", "hgrn2", "deltanet", "gdn", "kda", "rwkv7"):
        assert (parameters(mixer)["o_norm"] == 1).all(), mixer


@pytest.mark.parametrize("mixer", MixersConfig.names())
def test_projections_are_truncated_normals_of_the_width(mixer: str) -> None:
    values = parameters(mixer)
    for name in ("q_proj", "v_proj", "o_proj", "x_proj", "i_proj"):
        if f"{name}.weight" in values:
            weight = values[f"{name}.weight"]
            std = weight.shape[1] ** -0.5 if name != "o_proj" else DIM**-0.5
            assert weight.std().item() == pytest.approx(std, rel=0.05) and weight.abs().max() <= 3 * std, name
    if mixer == "rwkv7":
        assert values["k_proj.weight"].std().item() == pytest.approx(0.1 * DIM**-0.5, rel=0.05)


@pytest.mark.parametrize("mixer", ["retnet", "mamba2", "gla", "hgrn2", "deltanet", "gdn", "kda", "rwkv7"])
def test_decays_stay_in_fp32_in_a_bf16_model(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They multiply over thousands of tokens; what the operators are given is looked at where they are called."""
    import lt2titan.kernels.recurrence as recurrence

    seen: dict[str, torch.dtype] = {}
    call = recurrence.Recurrence.__call__

    def spy(self: recurrence.Recurrence, *inputs: Tensor, **options: object) -> object:
        seen.update(zip(self.input_names, (x.dtype for x in inputs), strict=True))
        return call(self, *inputs, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(recurrence.Recurrence, "__call__", spy)
    config = ModelConfig(vocab_size=32, dim=DIM, n_layers=1, n_loops=1, mixer=mixer)
    model = build_on_meta(config, "reference")
    materialise(model, torch.device("cpu"), seed=0)
    model.to(torch.bfloat16)
    assert model(torch.arange(9).view(1, -1)).isfinite().all()
    assert seen["q"] == seen["v"] == torch.bfloat16
    assert seen["g"] == torch.float32 and seen.get("beta", torch.float32) == torch.float32
