"""Sizes and switches of each token mixer, ``[model.mixers.<name>]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

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


@dataclass(kw_only=True, slots=True)
class FullConfig:
    """Softmax attention over all earlier tokens."""

    n_heads: int = 16
    """Heads of the queries; must split dim."""
    n_kv_heads: int = 0
    """Key and value heads (grouped-query attention); 0 means as many as n_heads."""
    output_gate: bool = False
    """Multiply the attention output by sigmoid(W_g x), W_g zero-initialised, before the output projection."""

    def validate(self, dim: int) -> None:
        check_heads(self, dim)


@dataclass(kw_only=True, slots=True)
class WindowConfig:
    """Softmax attention over the last `window` tokens, the token itself included."""

    n_heads: int = 16
    """Heads of the queries; must split dim."""
    n_kv_heads: int = 0
    """Key and value heads (grouped-query attention); 0 means as many as n_heads."""
    window: int = 2048
    """Keys a token sees, itself included."""
    output_gate: bool = False
    """Multiply the attention output by sigmoid(W_g x), W_g zero-initialised, before the output projection."""

    def validate(self, dim: int) -> None:
        check_heads(self, dim)
        require(self.window > 0, self, "window", "must be positive (the token itself counts)")


@dataclass(kw_only=True, slots=True)
class GDNConfig:
    """Gated delta network: S <- a (I - b k k^T) S + b k v^T with a scalar decay a per head (arXiv 2412.06464)."""

    n_heads: int = 16
    """Heads of queries and keys."""
    n_v_heads: int = 0
    """Heads of values (grouped values), a multiple of n_heads; 0 means as many as n_heads."""
    expand_k: float = 0.75
    """Total key width as a multiple of dim."""
    expand_v: float = 1.5
    """Total value width as a multiple of dim."""
    conv_size: int = 4
    """Taps of the causal depthwise convolution on q, k and v."""
    allow_neg_eigval: bool = False
    """Let b reach 2, so that a transition may have negative eigenvalues (arXiv 2411.12537)."""

    def validate(self, dim: int) -> None:
        require(self.n_heads > 0, self, "n_heads", "must be positive")
        require(
            self.n_v_heads >= 0 and self.n_v_heads % self.n_heads == 0,
            self,
            "n_v_heads",
            f"must be 0 or a multiple of n_heads {self.n_heads}",
        )
        for name, n_heads in (("expand_k", self.n_heads), ("expand_v", self.n_v_heads or self.n_heads)):
            width = getattr(self, name) * dim
            require(
                width > 0 and width == int(width),
                self,
                name,
                f"times dim {dim} is {width}, not a whole width",
            )
            if int(width) % n_heads:
                heads_field = "n_heads" if name == "expand_k" or not self.n_v_heads else "n_v_heads"
                reason = f"does not divide the width {int(width)} of {name}; these do: {divisors(int(width))}"
                raise ConfigError(heads_field, n_heads, reason)
        require(self.conv_size >= 2, self, "conv_size", "must be at least 2 taps")


@dataclass(kw_only=True, slots=True)
class MixersConfig:
    """Token mixers, one table each; only those that the model names are used."""

    full: FullConfig = field(default_factory=FullConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    gdn: GDNConfig = field(default_factory=GDNConfig)

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]
