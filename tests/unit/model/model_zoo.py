"""Small models of every kind, in fp64, with every parameter away from its neutral value."""

from __future__ import annotations

from dataclasses import replace

import torch

from lt2titan.model.config import HybridConfig, LoopConfig, ModelConfig
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

MIXERS = MixersConfig(
    full=FullConfig(n_heads=4, n_kv_heads=2, output_gate=True),
    window=WindowConfig(n_heads=4, window=5),
    retnet=RetNetConfig(n_heads=2, expand_k=1.5, expand_v=1.25),
    mamba2=Mamba2Config(n_heads=4, n_groups=2, state_size=6),
    gla=GLAConfig(n_heads=2, expand_k=0.75, decay_rank=3),
    hgrn2=HGRN2Config(n_heads=2),
    deltanet=DeltaNetConfig(n_heads=2, expand_v=1.25, allow_neg_eigval=True),
    gdn=GDNConfig(n_heads=2, n_v_heads=4, allow_neg_eigval=True),
    kda=KDAConfig(n_heads=2, n_v_heads=4, expand_v=1.5, allow_neg_eigval=True),
    rwkv7=RWKV7Config(head_dim=8, decay_rank=3, a_rank=4, v_rank=5, gate_rank=6),
    nsa=NSAConfig(n_heads=4, n_kv_heads=1, block_size=2, n_blocks=4, window=3),
    dsa=DSAConfig(n_heads=4, n_kv_heads=2, output_gate=True, top_k=4, n_index_heads=3, index_head_dim=6),
)

REUSING = DSAConfig(
    n_heads=2, top_k=5, n_index_heads=2, index_head_dim=4, forced_first=True, forced_local=2, reuse_every=2
)


def small(mixer: str, rare: str = "", **changes: object) -> ModelConfig:
    defaults: dict[str, object] = {
        "vocab_size": 19,
        "dim": 16,
        "n_layers": 3 if rare else 2,
        "n_loops": 3,
        "mixer": mixer,
        "ffn_dim": 24,
        "hybrid": HybridConfig(mixer=rare, ratio=2),
        "mixers": MIXERS,
    }
    return ModelConfig(**{**defaults, **changes})  # type: ignore[arg-type]


ZOO = {
    "full": small("full"),
    "window": small("window"),
    "retnet": small("retnet"),
    "retnet+full": small("retnet", "full"),
    "mamba2": small("mamba2"),
    "mamba2+full": small("mamba2", "full"),
    "gla": small("gla"),
    "gla+full": small("gla", "full"),
    "hgrn2": small("hgrn2"),
    "hgrn2+full": small("hgrn2", "full"),
    "deltanet": small("deltanet"),
    "deltanet+full": small("deltanet", "full"),
    "kda": small("kda"),
    "kda+full": small("kda", "full"),
    "kda, bounded gate": small("kda", mixers=replace(MIXERS, kda=KDAConfig(n_heads=2, bounded_gate=True))),
    "rwkv7": small("rwkv7"),
    "rwkv7+full bookend": small(
        "rwkv7", "full", n_layers=4, hybrid=HybridConfig(mixer="full", ratio=1, placement="bookend")
    ),
    "nsa": small("nsa"),
    "nsa, two key heads": small(
        "nsa", mixers=replace(MIXERS, nsa=NSAConfig(n_heads=4, n_kv_heads=2, block_size=3, n_blocks=3, window=5))
    ),
    "gdn+nsa": small("gdn", "nsa"),
    "dsa": small("dsa"),
    "gdn+dsa, forced tokens, reuse": small("gdn", "dsa", n_layers=6, mixers=replace(MIXERS, dsa=REUSING)),
    "dsa+full": small("dsa", "full"),
    "gdn": small("gdn"),
    "gdn+full": small("gdn", "full"),
    "full+gdn bookend": small("full", "gdn", hybrid=HybridConfig(mixer="gdn", ratio=1, placement="bookend")),
    "window+full, untied, no rho": small("window", "full", tie_embeddings=False, loop=LoopConfig(residual_gate=False)),
    "gdn+full, window per loop": small("gdn", "full", loop=LoopConfig(windows=[-1, 6, 3])),
    "gdn, one loop": small("gdn", n_loops=1),
}


def build(config: ModelConfig, seed: int = 0) -> LT2:
    """The model in fp64; parameters that start neutral (rho, gates, norms) are moved so that tests see them."""
    config.validate()
    model = build_on_meta(config, "reference")
    materialise(model, torch.device("cpu"), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            neutral = name.endswith(("gate_proj.weight", "gate_bias", "a_bias", "lora.down_proj.weight"))
            if name == "core.rho" or "norm" in name or neutral:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double()
