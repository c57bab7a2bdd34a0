"""Sizes and switches of each token mixer, ``[model.mixers.<name>]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from lt2titan.model.mixers.config.deltanet import DeltaNetConfig
from lt2titan.model.mixers.config.dsa import DSAConfig
from lt2titan.model.mixers.config.full import FullConfig
from lt2titan.model.mixers.config.gdn import GDNConfig
from lt2titan.model.mixers.config.gla import GLAConfig
from lt2titan.model.mixers.config.hgrn2 import HGRN2Config
from lt2titan.model.mixers.config.kda import KDAConfig
from lt2titan.model.mixers.config.mamba2 import Mamba2Config
from lt2titan.model.mixers.config.nsa import NSAConfig
from lt2titan.model.mixers.config.retnet import RetNetConfig
from lt2titan.model.mixers.config.rwkv7 import RWKV7Config
from lt2titan.model.mixers.config.window import WindowConfig

__all__ = [
    "DSAConfig",
    "DeltaNetConfig",
    "FullConfig",
    "GDNConfig",
    "GLAConfig",
    "HGRN2Config",
    "KDAConfig",
    "Mamba2Config",
    "MixersConfig",
    "NSAConfig",
    "RWKV7Config",
    "RetNetConfig",
    "WindowConfig",
]


@dataclass(kw_only=True, slots=True)
class MixersConfig:
    """Token mixers, one table each; only those that the model names are used."""

    full: FullConfig = field(default_factory=FullConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    retnet: RetNetConfig = field(default_factory=RetNetConfig)
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    gla: GLAConfig = field(default_factory=GLAConfig)
    hgrn2: HGRN2Config = field(default_factory=HGRN2Config)
    deltanet: DeltaNetConfig = field(default_factory=DeltaNetConfig)
    gdn: GDNConfig = field(default_factory=GDNConfig)
    kda: KDAConfig = field(default_factory=KDAConfig)
    rwkv7: RWKV7Config = field(default_factory=RWKV7Config)
    nsa: NSAConfig = field(default_factory=NSAConfig)
    dsa: DSAConfig = field(default_factory=DSAConfig)

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]
