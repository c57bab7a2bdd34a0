"""Small models that recompute, and what the tests of checkpointing count of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from lt2titan.kernels import dplr_delta_rule, gated_delta_rule, short_convolution
from lt2titan.model.config import HybridConfig, LoopConfig, ModelConfig
from lt2titan.model.context import Context
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import (
    DeltaNetConfig,
    DSAConfig,
    FullConfig,
    GDNConfig,
    GLAConfig,
    HGRN2Config,
    KDAConfig,
    Mamba2Config,
    MixersConfig,
    NSAConfig,
    RetNetConfig,
    RWKV7Config,
    WindowConfig,
)
from lt2titan.parallel.activation_checkpoint import apply_activation_checkpoint

CPU = torch.device("cpu")
N_LOOPS = 3


def config(common: str, **changes: Any) -> ModelConfig:
    """Three layers, the last of them full attention."""
    mixers = MixersConfig(
        full=FullConfig(n_heads=2, output_gate=True),
        window=WindowConfig(n_heads=2, window=5),
        retnet=RetNetConfig(n_heads=2),
        mamba2=Mamba2Config(n_heads=4, n_groups=2, state_size=6),
        gla=GLAConfig(n_heads=2, decay_rank=3),
        hgrn2=HGRN2Config(n_heads=2),
        deltanet=DeltaNetConfig(n_heads=2),
        kda=KDAConfig(n_heads=2, n_v_heads=4),
        gdn=GDNConfig(n_heads=2),
        rwkv7=RWKV7Config(head_dim=8, decay_rank=3, a_rank=4, v_rank=5, gate_rank=6),
        nsa=NSAConfig(n_heads=2, block_size=2, n_blocks=3, window=3),
        dsa=DSAConfig(n_heads=2, top_k=4, n_index_heads=2, index_head_dim=4),
    )
    defaults: dict[str, Any] = {"n_layers": 3, "hybrid": HybridConfig(mixer="full", ratio=2), "mixers": mixers}
    return ModelConfig(vocab_size=19, dim=16, n_loops=N_LOOPS, mixer=common, ffn_dim=24, **{**defaults, **changes})


def pair(common: str, rare: str) -> ModelConfig:
    """A layer of each."""
    return config(common, n_layers=2, hybrid=HybridConfig(mixer=rare, ratio=1))


CONFIGS = {
    "full": config("full", hybrid=HybridConfig()),
    "gdn+full": config("gdn"),
    "rwkv7+full": config("rwkv7"),
    # The carry's writer is the top layer.
    "full+rwkv7": config("full", hybrid=HybridConfig(mixer="rwkv7", ratio=2)),
    "nsa+full": config("nsa"),
    "gdn+dsa": config("gdn", hybrid=HybridConfig(mixer="dsa", ratio=2)),
    "window per loop": config("gdn", loop=LoopConfig(windows=[-1, 6, 3])),
    "mamba2+window": pair("mamba2", "window"),
    "retnet+gla": pair("retnet", "gla"),
    "deltanet+kda": pair("deltanet", "kda"),
    "hgrn2+full": pair("hgrn2", "full"),
}


def build(name: str, mode: str = "none", skip_last_loops: int = 0) -> LT2:
    model = build_on_meta(CONFIGS[name], "reference")
    apply_activation_checkpoint(model, mode, skip_last_loops=skip_last_loops)
    materialise(model, CPU, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_neutral = parameter_name.endswith(("gate_proj.weight", "gate_bias", "a_bias", "lora.down_proj.weight"))
            if parameter_name == "core.rho" or is_neutral:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def batch(is_packed: bool = False, length: int = 24) -> dict[str, Tensor]:
    tokens = torch.randint(0, 19, (2, length), generator=torch.Generator().manual_seed(2))
    if not is_packed:
        return {"tokens": tokens, "targets": tokens}
    ends = [0, 5, length + 3, 2 * length]  # a document crosses the rows
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)]).view(2, length)
    return {
        "tokens": tokens,
        "targets": tokens,
        "positions": positions,
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
    }


def gradients(model: LT2, inputs: dict[str, Tensor], **loops: int) -> dict[str, Tensor]:
    loss = model(**inputs, max_seqlen=48, **loops)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def core_inputs(model: LT2, inputs: dict[str, Tensor]) -> tuple[Tensor, Context]:
    """What the core is called with."""
    seen: list[Any] = []
    hook = model.core.register_forward_pre_hook(lambda _, args: seen.extend(args[:2]))
    with torch.no_grad():
        model(**inputs, max_seqlen=48)
    hook.remove()
    h, context = seen
    return h.requires_grad_(), context


def n_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def saved_bytes(model: LT2, h: Tensor, context: Context) -> int:
    """Storages that autograd packs, weights left out."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda t: t):
        model.core(h, context)
    storages = {t.untyped_storage()._cdata: n_bytes(t) for t in saved}
    return sum(size for key, size in storages.items() if key not in weights)


EXECUTIONS = {"none": 1, "selective": 1, "block": 2, "loop": 2, "nested": 3}


@contextmanager
def executions() -> Iterator[Counter[str]]:
    """How often the reference operators compute their outputs; in their backward pass they do it for torch.func.vjp,
    which does not count."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any) -> Any:
            counts[name] += not torch._C._functorch.is_gradtrackingtensor(tree_leaves(first)[0])
            return function(first, *rest)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module in (gated_delta_rule, dplr_delta_rule):
            operator = module.OPERATOR
            patch.setattr(operator, "reference", counted(operator.name, operator.reference))
        convolution = short_convolution.short_convolution_reference
        patch.setattr(short_convolution, "short_convolution_reference", counted("short_convolution", convolution))
        yield counts
