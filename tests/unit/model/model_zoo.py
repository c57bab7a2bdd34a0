"""Small models of every kind, in fp64, with every parameter away from its neutral value."""

from __future__ import annotations

import torch

from lt2titan.model.config import HybridConfig, LoopConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, GDNConfig, MixersConfig, WindowConfig

MIXERS = MixersConfig(
    full=FullConfig(n_heads=4, n_kv_heads=2, output_gate=True),
    window=WindowConfig(n_heads=4, window=5),
    gdn=GDNConfig(n_heads=2, n_v_heads=4, allow_neg_eigval=True),
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
            if name == "core.rho" or "norm" in name or name.endswith("gate_proj.weight"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double()
