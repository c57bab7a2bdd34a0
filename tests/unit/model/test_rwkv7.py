"""What is particular to RWKV-7; the shared tests compare it with the paper's equations."""

from __future__ import annotations

import pytest
import torch

from lt2titan.model.mixers.base import Common
from lt2titan.model.mixers.config import RWKV7Config
from lt2titan.model.mixers.rwkv7 import RWKV7

DIM, HEAD_DIM = 64, 16


def test_ranks_of_the_reference_sizes() -> None:
    config = RWKV7Config()
    fields = ("decay_rank", "a_rank", "v_rank", "gate_rank")
    assert [config.rank(field, 1024) for field in fields] == [64, 64, 64, 160]
    assert [config.rank(field, 2048) for field in fields] == [128, 128, 64, 224]
    assert [config.rank(field, 64) for field in fields] == [32, 32, 32, 32]
    assert RWKV7Config(gate_rank=48).rank("gate_rank", 1024) == 48


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("layer", "n_layers", "names"),
    [  # where what they scale by depth has the value of the middle of a stack
        (1, 3, {"w_bias": "w_lora.lora.2.bias", "a_bias": "a_lora.lora.2.bias", "v_bias": "v_lora.lora.2.bias"}),
        (1, 3, {"k_k": "k_k", "k_a": "k_a", "r_k": "r_k", "o_norm_bias": "g_norm.bias"}),
        (2, 4, {name: name for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")}),
    ],
)
def test_initial_values_are_those_of_fla_in_the_middle_of_a_stack(
    layer: int, n_layers: int, names: dict[str, str]
) -> None:
    pytest.importorskip("transformers", exc_type=ImportError)
    layers = pytest.importorskip("fla.layers.rwkv7", exc_type=ImportError)
    theirs = layers.RWKV7Attention(
        hidden_size=DIM, head_dim=HEAD_DIM, layer_idx=layer, num_hidden_layers=n_layers
    ).state_dict()
    own = RWKV7(RWKV7Config(head_dim=HEAD_DIM), Common(DIM, 1e-5, is_first=False, backend="reference"))
    for ours, name in names.items():
        values = torch.empty(DIM)
        own.init_parameter(ours, values, torch.Generator())
        torch.testing.assert_close(values, theirs[name].flatten(), msg=lambda message, name=ours: f"{name}: {message}")
