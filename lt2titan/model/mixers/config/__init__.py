"""Sizes and switches of each token mixer, ``[model.mixers.<name>]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from lt2titan.model.mixers.config.full import FullConfig
from lt2titan.model.mixers.config.gdn import GDNConfig
from lt2titan.model.mixers.config.window import WindowConfig

__all__ = ["FullConfig", "GDNConfig", "MixersConfig", "WindowConfig"]


@dataclass(kw_only=True, slots=True)
class MixersConfig:
    """Token mixers, one table each; only those that the model names are used."""

    full: FullConfig = field(default_factory=FullConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    gdn: GDNConfig = field(default_factory=GDNConfig)

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]
