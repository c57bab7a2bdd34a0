"""The (gated) delta networks against those of transformers: Qwen3-Next (grouped values), OLMo Hybrid (beta up to 2).

DeltaNet is OLMo's layer with a decay of exp(-0 * ...) = 1 and an output gate whose SiLU is 1.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lt2titan.model.context import Context
from lt2titan.model.mixers.base import Common, Mixer
from lt2titan.model.mixers.config import DeltaNetConfig, GDNConfig
from lt2titan.model.mixers.deltanet import DeltaNet
from lt2titan.model.mixers.gdn import GDN

transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

DIM, N_HEADS, KEY_WIDTH, VALUE_WIDTH, EPS = 32, 2, 12, 8, 1e-5
SILU_IS_ONE = 1.2784645427610738
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # theirs computes in fp32 whatever the dtype


Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]
FAMILIES = ["qwen3_next", "olmo_hybrid", "deltanet"]

COMMON = Common(DIM, EPS, is_first=True, backend="reference")


def theirs(family: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[nn.Module, Any]:
    """Their layer, and an empty cache for it."""
    prefix = {"qwen3_next": "Qwen3Next", "olmo_hybrid": "OlmoHybrid"}[family]
    config = getattr(transformers, f"{prefix}Config")(
        hidden_size=DIM,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=2,
        linear_num_key_heads=N_HEADS,
        linear_key_head_dim=KEY_WIDTH,
        linear_value_head_dim=VALUE_WIDTH,
        rms_norm_eps=EPS,
        **changes,
    )
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    # Where fla is installed they call its kernels, which need a GPU; their own code lies beneath.
    for name in (
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    ):
        monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)), raising=False)
    return getattr(module, f"{prefix}GatedDeltaNet")(config, layer_idx=0), transformers.DynamicCache(config=config)


def for_olmo(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters (or their gradients) under their names: one convolution for q, k and v."""
    renamed = {name.replace("gate_proj", "g_proj"): x for name, x in own.items() if not name.endswith("_conv")}
    renamed["o_norm.weight"] = renamed.pop("o_norm")
    renamed["conv1d.weight"] = torch.cat([own["q_conv"], own["k_conv"], own["v_conv"]]).unsqueeze(1)
    return renamed


def for_qwen(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """As for OLMo; and all projections of a key head stand together: its q, k, v and gate rows, its b and a rows."""
    rows = {name: own[f"{name}_proj.weight"].chunk(N_HEADS) for name in ("q", "k", "v", "gate", "b", "a")}
    return {
        "in_proj_qkvz.weight": torch.cat([rows[n][h] for h in range(N_HEADS) for n in ("q", "k", "v", "gate")]),
        "in_proj_ba.weight": torch.cat([rows[n][h] for h in range(N_HEADS) for n in ("b", "a")]),
        "conv1d.weight": torch.cat([own["q_conv"], own["k_conv"], own["v_conv"]]).unsqueeze(1),
        "norm.weight": own["o_norm"],
        "out_proj.weight": own["o_proj.weight"],
        "A_log": own["A_log"],
        "dt_bias": own["dt_bias"],
    }


class Ungated(nn.Module):
    """In place of OLMo's gate projection."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_full((*x.shape[:-1], N_HEADS * VALUE_WIDTH), SILU_IS_ONE)


def pair(family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Mixer, nn.Module, Any, Rename]:
    """Ours, theirs with the same parameters, their cache, and the map from our parameters to theirs."""
    n_v_heads = 4 if family == "qwen3_next" else N_HEADS
    sizes: dict[str, Any] = {
        "n_heads": N_HEADS,
        "expand_k": N_HEADS * KEY_WIDTH / DIM,
        "expand_v": n_v_heads * VALUE_WIDTH / DIM,
        "allow_neg_eigval": family != "qwen3_next",
    }
    own: Mixer
    if family == "deltanet":
        own = DeltaNet(DeltaNetConfig(**sizes), COMMON)
    else:
        own = GDN(GDNConfig(n_v_heads=n_v_heads, **sizes), COMMON)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # all parameters away from their neutral values
        for name, parameter in own.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if "proj" in name else 0.5))
    if family == "qwen3_next":
        rename: Rename = for_qwen
        layer, cache = theirs(family, monkeypatch, linear_num_value_heads=n_v_heads)
    else:
        rename = for_olmo
        layer, cache = theirs(
            "olmo_hybrid", monkeypatch, linear_num_value_heads=n_v_heads, linear_allow_neg_eigval=True
        )
    parameters = rename(dict(own.named_parameters()))
    if family == "deltanet":
        layer.g_proj = Ungated()
        parameters |= {"A_log": torch.full((N_HEADS,), -torch.inf), "dt_bias": torch.zeros(N_HEADS)}
        parameters["a_proj.weight"] = torch.zeros(N_HEADS, DIM)
    layer.load_state_dict(parameters)
    return own, layer, cache, rename


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_match(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, layer, _, rename = pair(family, monkeypatch)
    x = torch.randn(2, 75, DIM, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.randn(2, 75, DIM, generator=torch.Generator().manual_seed(2))
    y, _ = own(x, Context(torch.arange(75).expand(2, -1)), {})
    expected = layer(x)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    parameters = dict(own.named_parameters())
    dx, *grads = torch.autograd.grad((y * weights).sum(), [x, *parameters.values()])
    renamed = rename(dict(zip(parameters, grads, strict=True)))
    expected_parameters = [layer.get_parameter(name) for name in renamed]
    expected_dx, *expected_grads = torch.autograd.grad((expected * weights).sum(), [x, *expected_parameters])
    torch.testing.assert_close(dx, expected_dx, **TOLERANCE)
    for (name, grad), expected_grad in zip(renamed.items(), expected_grads, strict=True):
        assert (grad - expected_grad).norm() / expected_grad.norm() < 2e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_matches(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, layer, cache, _ = pair(family, monkeypatch)
    x = torch.randn(2, 12, DIM, generator=torch.Generator().manual_seed(3))
    state = {name: torch.zeros(spec.shape) for name, spec in own.state_spec(2, 12, None).items()}
    with torch.no_grad():
        for piece in x.split([7, 1, 1, 1, 1, 1], dim=1):
            y, _ = own(piece, Context(torch.zeros(2, piece.shape[1], dtype=torch.long)), {}, state)
            torch.testing.assert_close(y, layer(piece, cache_params=cache), **TOLERANCE)
