"""What tensor parallelism can split evenly. Imports without torch."""

from __future__ import annotations

from lt2titan.config.section import ConfigError
from lt2titan.model.config import ModelConfig
from lt2titan.model.mixers.config.sizes import divisors


def check_tensor_parallel(model: ModelConfig, degree: int) -> None:
    """Refuse a degree that does not split the heads of every mixer, the SwiGLU and the vocabulary evenly.

    Raises:
        ConfigError: tensor_parallel_degree, with the first size that it does not split and the degrees that would do.
    """
    misfits = _misfits(model, degree)
    if misfits:
        smallest = min(_sizes(model).values())
        fitting = [n for n in divisors(smallest) if not _misfits(model, n)]
        reason = f"does not split {misfits[0]}; degrees that split this model evenly: {fitting}"
        raise ConfigError("tensor_parallel_degree", degree, reason)


def _misfits(model: ModelConfig, degree: int) -> list[str]:
    misfits = [
        f"model.{name} = {size} (the next that it splits is {-(-size // degree) * degree})"
        for name, size in _sizes(model).items()
        if size % degree
    ]
    n_groups = model.mixers.mamba2.n_groups
    if "mamba2" in model.layer_mixers and n_groups % degree and degree % n_groups:
        misfits.append(f"model.mixers.mamba2.n_groups = {n_groups}, nor do these split it")
    return misfits


def _sizes(model: ModelConfig) -> dict[str, int]:
    """What every rank must have an equal share of."""
    sizes = {}
    for name in dict.fromkeys(model.layer_mixers):
        section = getattr(model.mixers, name)
        if name == "rwkv7":
            sizes["mixers.rwkv7 heads (dim / head_dim)"] = model.dim // section.head_dim
            continue
        sizes[f"mixers.{name}.n_heads"] = section.n_heads
        # Then every rank has the key heads that its query heads read: dsa whatever they are, nsa if there is one.
        is_shared = name == "dsa" or (name == "nsa" and section.n_kv_heads == 1)
        if getattr(section, "n_kv_heads", 0) and not is_shared:  # of grouped values there are multiples of n_heads
            sizes[f"mixers.{name}.n_kv_heads"] = section.n_kv_heads
    sizes["ffn_dim"] = model.ffn_width
    sizes["vocab_size"] = model.vocab_size
    return sizes
