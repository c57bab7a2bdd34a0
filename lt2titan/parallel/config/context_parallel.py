"""What context parallelism can split. Imports without torch."""

from __future__ import annotations

from lt2titan.config.section import ConfigError
from lt2titan.model.config import ModelConfig
from lt2titan.model.mixers.config.sizes import divisors


def check_ring(model: ModelConfig, degree: int, document_mask: bool, precision: str) -> None:
    """Refuse a ring of keys where there is none to go round, or attention is not full, over dense rows, in bf16.

    Raises:
        ConfigError: context_parallel_attention, with what stands in its way.
    """
    obstacles = {
        "context_parallel_degree = 1": degree == 1,
        "no full layers": "full" not in model.layer_mixers,
        'training.mixed_precision_param = "float32"': precision == "float32",
        "data.document_mask = true": document_mask,
        f"model.loop.windows = {model.loop.windows}": any(window > 0 for window in model.loop.windows),
        "window layers": "window" in model.layer_mixers,
    }
    for what, stands in obstacles.items():
        if stands:
            reason = f"full attention over dense rows of several ranks, in bfloat16, and this run has {what}"
            reason = f'is for {reason}; use "gather"'
            raise ConfigError("context_parallel_attention", "ring", reason)


def check_context_parallel(model: ModelConfig, lengths: dict[str, int], degree: int) -> None:
    """Refuse a degree that does not split rows evenly, or whose stretches are shorter than a convolution reaches back.

    Args:
        lengths: of rows in tokens, by the key that sets them.

    Raises:
        ConfigError: context_parallel_degree, with the numbers.
    """
    history = max(getattr(getattr(model.mixers, name), "conv_size", 2) - 1 for name in model.layer_mixers)
    for name, length in lengths.items():
        if length % degree:
            nearest = -(-length // degree) * degree
            reason = f"does not divide {name} = {length}; change either (the next length that it divides is {nearest})"
            raise ConfigError("context_parallel_degree", degree, reason)
        if length // degree < history and degree > 1:
            reason = (
                f"{name} = {length} would leave {length // degree} tokens per rank, and the model's mixers look "
                f"{history} tokens back; use at most {max(n for n in divisors(length) if length // n >= history)}"
            )
            raise ConfigError("context_parallel_degree", degree, reason)
