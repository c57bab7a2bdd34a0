"""Kimi delta attention against that of transformers (Kimi Linear) and the gates of flash-linear-attention."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import Tensor, nn

from lt2titan.model.context import Context
from lt2titan.model.mixers.base import Common
from lt2titan.model.mixers.config import KDAConfig
from lt2titan.model.mixers.kda import KDA

DIM, N_HEADS, EPS = 24, 3, 1e-5
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # theirs computes in fp32 whatever the dtype


def make(config: KDAConfig) -> KDA:
    """Ours, with parameters away from their neutral values."""
    config.validate(DIM)
    mixer = KDA(config, Common(DIM, EPS, is_first=True, backend="reference"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if "proj" in name else 0.5))
    return mixer


def theirs(own: KDA, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Their layer with our parameters, on its plain PyTorch path."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    module = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear", exc_type=ImportError)
    # Where fla is installed they call its kernels, which need a GPU; their own code lies beneath.
    for name in ("recurrent_kimi_delta_attention", "chunk_kimi_delta_attention", "causal_conv1d_fn"):
        monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))
    config = transformers.KimiLinearConfig(
        hidden_size=DIM,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_heads=N_HEADS,
        linear_head_dim=DIM // N_HEADS,
        linear_conv_kernel_dim=4,
        rms_norm_eps=EPS,
    )
    layer = module.KimiLinearDeltaAttention(config, layer_idx=0)
    layer.load_state_dict(renamed(dict(own.named_parameters())))
    return layer


def renamed(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters (or their gradients) under their names: one convolution for q, k and v, no bias of the gate."""
    names = {f"{n}_proj.weight": f"{n}_proj.weight" for n in "qkvbo"} | {
        "a_down_proj.weight": "forget_gate.f_a_proj.weight",
        "a_up_proj.weight": "forget_gate.f_b_proj.weight",
        "dt_bias": "forget_gate.dt_bias",
        "gate_down_proj.weight": "g_a_proj.weight",
        "gate_up_proj.weight": "g_b_proj.weight",
        "o_norm": "o_norm.weight",
    }
    return {theirs: own[ours] for ours, theirs in names.items()} | {
        "conv1d.weight": torch.cat([own["q_conv"], own["k_conv"], own["v_conv"]]).unsqueeze(1),
        "forget_gate.A_log": own["A_log"].view(1, 1, -1, 1),
    }


def test_outputs_and_gradients_match_kimi_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    own = make(KDAConfig(n_heads=N_HEADS))
    with torch.no_grad():
        own.gate_bias.zero_()
    layer = theirs(own, monkeypatch)
    x = torch.randn(2, 75, DIM, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.randn(2, 75, DIM, generator=torch.Generator().manual_seed(2))
    y, _ = own(x, Context(torch.arange(75).expand(2, -1)), {})
    expected = layer(x)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    parameters, expected_parameters = dict(own.named_parameters()), dict(layer.named_parameters())
    dx, *grads = torch.autograd.grad((y * weights).sum(), [x, *parameters.values()])
    expected_dx, *expected_grads = torch.autograd.grad((expected * weights).sum(), [x, *expected_parameters.values()])
    torch.testing.assert_close(dx, expected_dx, **TOLERANCE)
    got = renamed(dict(zip(parameters, grads, strict=True)))
    for name, expected_grad in zip(expected_parameters, expected_grads, strict=True):
        assert (got[name] - expected_grad).norm() < 2e-5 * expected_grad.norm(), name


@pytest.mark.parametrize("bounded", [False, True])
def test_gates_match_those_of_fla(bounded: bool) -> None:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed", exc_type=ImportError)
    gates = importlib.import_module("fla.ops.kda.gate")
    own = make(KDAConfig(n_heads=N_HEADS, n_v_heads=2 * N_HEADS, bounded_gate=bounded, lower_bound=-4.0))
    x = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1))
    f = own.a_up_proj(own.a_down_proj(x)).unflatten(-1, (2 * N_HEADS, -1))
    if bounded:
        expected = gates.naive_kda_lowerbound_gate(f, own.A_log, own.dt_bias, lower_bound=-4.0)
    else:
        expected = gates.naive_kda_gate(f, own.A_log, own.dt_bias)
    torch.testing.assert_close(own._log_decay(x), expected)
