"""Mixers against the layers of flash-linear-attention, whose kernels run in Triton's interpreter:

    TRITON_INTERPRET=1 pytest tests/unit/kernels/test_fla_layers.py

Outputs, the gradients of all parameters, and cached decoding, on the same parameters. As in test_fla_interpreter.py the
variable must be set before anything imports triton.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1 to run fla's kernels on the CPU", allow_module_level=True)
if _missing := [name for name in ("triton", "fla", "einops", "transformers") if importlib.util.find_spec(name) is None]:
    pytest.skip(f"not installed: {_missing}", allow_module_level=True)

import triton_interpreter

from lt2titan.kernels.nsa import block_layout
from lt2titan.model.context import Context, rotary_tables
from lt2titan.model.mixers.base import Common, Mixer
from lt2titan.model.mixers.config import (
    DeltaNetConfig,
    GDNConfig,
    GLAConfig,
    HGRN2Config,
    KDAConfig,
    NSAConfig,
    RetNetConfig,
    RWKV7Config,
)
from lt2titan.model.mixers.deltanet import DeltaNet
from lt2titan.model.mixers.gdn import GDN
from lt2titan.model.mixers.gla import GLA
from lt2titan.model.mixers.hgrn2 import HGRN2
from lt2titan.model.mixers.kda import KDA
from lt2titan.model.mixers.retnet import RetNet
from lt2titan.model.mixers.rwkv7 import FIRST_VALUE, RWKV7

triton_interpreter.install()

DIM, EPS = 32, 1e-5
COMMON = Common(DIM, EPS, is_first=True, backend="reference")
LENGTH = {
    "retnet": 70,
    "gla": 70,
    "hgrn2": 70,
    "deltanet": 60,
    "gdn": 70,
    "kda": 70,
    "kda bounded": 70,
    "kda grouped": 70,
    "rwkv7": 70,
    "rwkv7 later": 70,
}
"""Above 64 tokens fla's layers run chunk by chunk, below token by token. Its delta rule in chunks refuses fp32."""

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


class Pair(NamedTuple):
    """Our mixer, the name and arguments of fla's layer, and its parameters' names where they differ from ours."""

    own: Mixer
    layer: str
    arguments: dict[str, Any]
    names: dict[str, str]


CONVOLUTIONS = {f"{n}_conv": f"{n}_conv1d.weight" for n in "qkv"}


def pair(name: str) -> Pair:
    if name == "retnet":
        return Pair(
            RetNet(RetNetConfig(n_heads=2), COMMON),
            "MultiScaleRetention",
            {"num_heads": 2},
            {"gate_proj.weight": "g_proj.weight", "o_norm": "g_norm_swish_gate.weight"},
        )
    if name == "gla":
        return Pair(
            GLA(GLAConfig(n_heads=2), COMMON),
            "GatedLinearAttention",
            {"num_heads": 2},
            {
                "a_down_proj.weight": "gk_proj.0.weight",
                "a_up_proj.weight": "gk_proj.1.weight",
                "a_bias": "gk_proj.1.bias",
                "gate_proj.weight": "g_proj.weight",
                "o_norm": "g_norm_swish_gate.weight",
            },
        )
    if name == "hgrn2":
        return Pair(
            HGRN2(HGRN2Config(n_heads=2), COMMON),
            "HGRN2Attention",
            {"expand_ratio": DIM // 2},
            {"o_norm": "g_norm.weight"},
        )
    if name == "deltanet":
        return Pair(
            DeltaNet(DeltaNetConfig(n_heads=2, allow_neg_eigval=True), COMMON),
            "DeltaNet",
            {"num_heads": 2, "allow_neg_eigval": True},
            {**CONVOLUTIONS, "o_norm": "o_norm.weight"},
        )
    if name.startswith("kda"):
        n_v_heads, bounded = (4 if "grouped" in name else 2), "bounded" in name
        config = KDAConfig(
            n_heads=2, n_v_heads=n_v_heads, expand_v=n_v_heads / 2, bounded_gate=bounded, allow_neg_eigval=True
        )
        return Pair(
            KDA(config, COMMON),
            "KimiDeltaAttention",
            {
                "head_dim": DIM // 2,
                "num_heads": 2,
                "num_v_heads": n_v_heads,
                "expand_v": 1.0,
                "allow_neg_eigval": True,
                "safe_gate": bounded,
                "lower_bound": -5.0 if bounded else None,
            },
            {
                **CONVOLUTIONS,
                "a_down_proj.weight": "f_proj.0.weight",
                "a_up_proj.weight": "f_proj.1.weight",
                "gate_down_proj.weight": "g_proj.0.weight",
                "gate_up_proj.weight": "g_proj.1.weight",
                "gate_bias": "g_proj.1.bias",
                "o_norm": "o_norm.weight",
            },
        )
    if name.startswith("rwkv7"):
        return rwkv7_pair(is_first="later" not in name)
    return Pair(
        GDN(GDNConfig(n_heads=2, expand_k=0.75, expand_v=1.5), COMMON),
        "GatedDeltaNet",
        {"num_heads": 2, "head_dim": 12, "expand_v": 2.0},
        {**CONVOLUTIONS, "gate_proj.weight": "g_proj.weight", "o_norm": "o_norm.weight"},
    )


def rwkv7_pair(is_first: bool) -> Pair:
    ranks = {"decay": 4, "a": 5, "v": 6, "gate": 7}
    own = RWKV7(
        RWKV7Config(head_dim=DIM // 2, **{f"{name}_rank": rank for name, rank in ranks.items()}),
        COMMON._replace(is_first=is_first),
    )
    names = {"o_norm": "g_norm.weight", "o_norm_bias": "g_norm.bias"}
    names |= {f"{name}_bias": f"{name}_lora.lora.2.bias" for name in "wav"}
    for name, _ in own.named_parameters():
        if "lora" in name:
            theirs = name.replace("gate_lora", "g_lora").replace("down_proj", "lora.0").replace("up_proj", "lora.2")
            names[name] = theirs
    arguments = {f"{name}_low_rank_dim": rank for name, rank in ranks.items()}
    arguments |= {"head_dim": DIM // 2, "num_hidden_layers": 3, "layer_idx": 0 if is_first else 1}
    return Pair(own, "RWKV7Attention", arguments, names)


def build(name: str) -> tuple[Mixer, nn.Module, dict[str, str]]:
    """Ours and theirs with the same parameters, and their names for all of them."""
    import fla.layers

    triton_interpreter.patch_loops()
    own, layer, arguments, names = pair(name)
    theirs = getattr(fla.layers, layer)(**{"hidden_size": DIM, "norm_eps": EPS, "layer_idx": 0, **arguments})
    generator = torch.Generator().manual_seed(0)
    names = {name: names.get(name, name) for name, _ in own.named_parameters()}
    expected = dict(theirs.named_parameters())
    assert sorted(names.values()) == sorted(expected)
    with torch.no_grad():
        for ours, parameter in own.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if "proj" in ours else 0.5))
            expected[names[ours]].copy_(parameter.view_as(expected[names[ours]]))
    return own, theirs, names


def context(x: Tensor, own: Mixer, start: int = 0) -> Context:
    """Of tokens x (B, L, dim) at positions ``start``, start + 1, ..."""
    positions = (start + torch.arange(x.shape[1])).expand(x.shape[0], -1)
    width = own.rotary_dim
    return Context(positions, {width: rotary_tables(positions, width, 1e4)} if width else {})


@pytest.mark.parametrize("name", LENGTH)
def test_outputs_and_gradients_match(name: str) -> None:
    own, theirs, names = build(name)
    theirs.train()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, LENGTH[name], DIM, generator=generator, requires_grad=True)
    weights = torch.randn(1, LENGTH[name], DIM, generator=generator)
    # RWKV-7's later layers mix in the first layer's values, which ours take from the carry.
    first = torch.randn(1, LENGTH[name], DIM, generator=generator)
    y, _ = own(x, context(x, own), {FIRST_VALUE: first})
    expected = theirs(x, **({"v_first": first} if "rwkv7" in name else {}))[0]
    tolerance = {"rtol": 2e-5, "atol": 2e-5 * float(expected.detach().abs().max().clamp(min=1))}
    torch.testing.assert_close(y, expected, **tolerance)
    dx, *grads = torch.autograd.grad((y * weights).sum(), [x, *own.parameters()])
    expected_parameters = [theirs.get_parameter(theirs_name) for theirs_name in names.values()]
    expected_dx, *expected_grads = torch.autograd.grad((expected * weights).sum(), [x, *expected_parameters])
    # fla's layer for RWKV-7 inverts its chunks' matrices in fp16 even for fp32 inputs, which shows in the gradients.
    limit = 5e-4 if "rwkv7" in name else 2e-5
    for ours, grad, expected_grad in zip(["x", *names], [dx, *grads], [expected_dx, *expected_grads], strict=True):
        assert (grad.flatten() - expected_grad.flatten()).norm() / expected_grad.norm() < limit, ours


@pytest.mark.parametrize("name", [name for name in LENGTH if name != "rwkv7 later"])  # fla's cache wants layer 0
def test_cached_decoding_matches(name: str) -> None:
    from fla.models.utils import Cache

    own, theirs, _ = build(name)
    theirs.eval()
    x = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(3))
    state = {name: torch.zeros(spec.shape) for name, spec in own.state_spec(2, 9, None).items()}
    cache = Cache()
    with torch.no_grad():
        for start, piece in zip([0, 6, 7, 8], x.split([6, 1, 1, 1], dim=1), strict=True):
            y, _ = own(piece, context(piece, own, start), {}, state)
            expected, _, cache, *_ = theirs(piece, past_key_values=cache, use_cache=True)
            torch.testing.assert_close(y, expected, **TOLERANCE)


def test_native_sparse_attention_matches_but_for_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients; fla's window wants the flash-attn package, so it is left out here and there. Its kernels
    want 16 query heads for a key head."""
    import fla.layers

    import lt2titan.model.mixers.nsa as own_module

    triton_interpreter.patch_loops()
    monkeypatch.setattr(own_module, "attention", lambda q, *args, **options: torch.zeros_like(q))
    dim, length, size = 256, 100, 16
    own = own_module.NSA(NSAConfig(block_size=size, n_blocks=4), Common(dim, EPS, is_first=True, backend="reference"))
    sizes = {"num_heads": 16, "num_kv_heads": 1, "head_dim": 16, "block_size": size, "block_counts": 4}
    theirs = fla.layers.NativeSparseAttention(hidden_size=dim, window_size=0, layer_idx=0, **sizes)
    generator = torch.Generator().manual_seed(0)
    names = {name: name.replace("gate_proj", "g_proj") for name, _ in own.named_parameters()}
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
            theirs.get_parameter(names[name]).copy_(parameter)
    x = torch.randn(1, length, dim, generator=generator, requires_grad=True)
    layout = block_layout(1, length, size, None, x.device)
    y, _ = own(x, replace(context(x, own), key_blocks={size: layout}), {})
    expected = theirs(x)[0]
    torch.testing.assert_close(y, expected, **TOLERANCE)
    weights = torch.randn(y.shape, generator=generator)
    grads = torch.autograd.grad((y * weights).sum(), [x, *own.parameters()])
    expected_parameters = [theirs.get_parameter(name) for name in names.values()]
    expected_grads = torch.autograd.grad((expected * weights).sum(), [x, *expected_parameters])
    for name, grad, expected_grad in zip(["x", *names], grads, expected_grads, strict=True):
        assert (grad - expected_grad).norm() / expected_grad.norm() < 2e-5, name
