"""Sizes that fit together, and which would."""

from __future__ import annotations

import math

from lt2titan.config.section import ConfigError, require


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def check_heads(section: object, dim: int) -> None:
    """Heads must split the width evenly, RoPE needs an even head width, and query heads share key heads evenly."""
    n_heads, n_kv_heads = section.n_heads, section.n_kv_heads  # type: ignore[attr-defined]
    even = [n for n in divisors(dim) if (dim // n) % 2 == 0]
    require(n_heads > 0, section, "n_heads", "must be positive")
    require(
        n_heads in even,
        section,
        "n_heads",
        f"does not split dim {dim} into even head widths; these do: {even}",
    )
    require(n_kv_heads >= 0, section, "n_kv_heads", "must be 0 (as many as n_heads) or positive")
    require(
        n_kv_heads == 0 or n_heads % n_kv_heads == 0,
        section,
        "n_kv_heads",
        f"does not divide n_heads {n_heads}; these do: {divisors(n_heads)}",
    )


def check_expansion(section: object, field: str, dim: int, n_heads: int, heads_field: str = "n_heads") -> None:
    """``field`` of the section times dim must be a whole width that ``n_heads`` heads split evenly."""
    factor = getattr(section, field)
    require(math.isfinite(factor) and factor > 0, section, field, "must be positive and finite")
    width = round(factor * dim)
    nearest = max(width, 1) / dim
    require(
        width > 0 and math.isclose(width, factor * dim, rel_tol=1e-9),
        section,
        field,
        f"times dim {dim} is {factor * dim:g}, not a whole width; {nearest:g} gives {max(width, 1)}",
    )
    if width % n_heads:
        reason = f"does not divide the width {width} of {field}; these do: {divisors(width)}"
        raise ConfigError(heads_field, n_heads, reason)
