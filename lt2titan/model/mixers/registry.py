"""Which class a mixer's name in the configuration stands for."""

from __future__ import annotations

from lt2titan.model.config import ModelConfig
from lt2titan.model.mixers.base import Common, Mixer
from lt2titan.model.mixers.deltanet import DeltaNet
from lt2titan.model.mixers.dsa import DSA
from lt2titan.model.mixers.full import Full
from lt2titan.model.mixers.gdn import GDN
from lt2titan.model.mixers.gla import GLA
from lt2titan.model.mixers.hgrn2 import HGRN2
from lt2titan.model.mixers.kda import KDA
from lt2titan.model.mixers.mamba2 import Mamba2
from lt2titan.model.mixers.nsa import NSA
from lt2titan.model.mixers.retnet import RetNet
from lt2titan.model.mixers.rwkv7 import RWKV7
from lt2titan.model.mixers.window import Window

MIXERS: dict[str, type] = {
    "full": Full,
    "window": Window,
    "retnet": RetNet,
    "mamba2": Mamba2,
    "gla": GLA,
    "hgrn2": HGRN2,
    "deltanet": DeltaNet,
    "gdn": GDN,
    "kda": KDA,
    "rwkv7": RWKV7,
    "nsa": NSA,
    "dsa": DSA,
}


def build_mixer(name: str, config: ModelConfig, is_first: bool, backend: str) -> Mixer:
    """The mixer ``name`` with the sizes of ``model.mixers.<name>``; ``is_first`` of its kind in the physical stack."""
    common = Common(config.dim, config.norm_eps, is_first, backend, config.layer_mixers.count(name))
    return MIXERS[name](getattr(config.mixers, name), common)
