"""Mamba-2 against that of transformers, whose own PyTorch code computes in chunks of its own kind."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lt2titan.model.context import Context
from lt2titan.model.mixers.base import Common
from lt2titan.model.mixers.config import Mamba2Config
from lt2titan.model.mixers.mamba2 import Mamba2

transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

DIM, N_HEADS, STATE, EPS = 24, 4, 10, 1e-5
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # theirs computes in fp32 whatever the dtype

groups = pytest.mark.parametrize("n_groups", [1, 2])


def pair(n_groups: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Mamba2, nn.Module, Any]:
    """Ours, with parameters away from their neutral values, theirs with the same, and an empty cache for theirs."""
    config = Mamba2Config(n_heads=N_HEADS, n_groups=n_groups, state_size=STATE)
    config.validate(DIM)
    own = Mamba2(config, Common(DIM, EPS, is_first=True, backend="reference"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if "proj" in name else 0.5))
    from transformers.models.mamba2 import modeling_mamba2 as module

    # Where Mamba's own kernels are installed they are called, which needs a GPU; the PyTorch code lies beneath.
    for name in (
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "mamba2_chunk_scan",
        "mamba2_selective_state_update",
        "mamba2_split_conv1d_scan_combined",
    ):
        monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))
    their_config = transformers.Mamba2Config(
        hidden_size=DIM,
        num_heads=N_HEADS,
        head_dim=2 * DIM // N_HEADS,
        state_size=STATE,
        n_groups=n_groups,
        layer_norm_epsilon=EPS,
        num_hidden_layers=1,
        chunk_size=16,
    )
    layer = module.Mamba2Mixer(their_config, layer_idx=0)
    layer.load_state_dict(renamed(dict(own.named_parameters())))
    return own, layer, transformers.DynamicCache(config=their_config)


def renamed(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters (or their gradients) under their names: one input projection, one convolution."""
    return {
        "in_proj.weight": torch.cat([own[f"{name}_proj.weight"] for name in ("gate", "x", "b", "c", "dt")]),
        "conv1d.weight": torch.cat([own[f"{name}_conv"] for name in "xbc"]).unsqueeze(1),
        "conv1d.bias": torch.cat([own[f"{name}_conv_bias"] for name in "xbc"]),
        "norm.weight": own["o_norm"],
        "out_proj.weight": own["o_proj.weight"],
        **{name: own[name] for name in ("A_log", "dt_bias", "D")},
    }


@groups
def test_outputs_and_gradients_match(n_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own, layer, _ = pair(n_groups, monkeypatch)
    x = torch.randn(2, 75, DIM, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.randn(2, 75, DIM, generator=torch.Generator().manual_seed(2))
    y, _ = own(x, Context(torch.arange(75).expand(2, -1)), {})
    expected = layer(x)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    parameters, expected_parameters = dict(own.named_parameters()), dict(layer.named_parameters())
    dx, *grads = torch.autograd.grad((y * weights).sum(), [x, *parameters.values()])
    expected_dx, *expected_grads = torch.autograd.grad((expected * weights).sum(), [x, *expected_parameters.values()])
    torch.testing.assert_close(dx, expected_dx, **TOLERANCE)
    ours = renamed(dict(zip(parameters, grads, strict=True)))
    assert set(ours) == set(expected_parameters)
    for name, expected_grad in zip(expected_parameters, expected_grads, strict=True):
        assert (ours[name] - expected_grad).norm() / expected_grad.norm() < 2e-5, name


@groups
def test_cached_decoding_matches(n_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own, layer, cache = pair(n_groups, monkeypatch)
    x = torch.randn(2, 12, DIM, generator=torch.Generator().manual_seed(3))
    state = {name: torch.zeros(spec.shape) for name, spec in own.state_spec(2, 12, None).items()}
    with torch.no_grad():
        for piece in x.split([7, 1, 1, 1, 1, 1], dim=1):
            y, _ = own(piece, Context(torch.zeros(2, piece.shape[1], dtype=torch.long)), {}, state)
            torch.testing.assert_close(y, layer(piece, cache_params=cache), **TOLERANCE)
