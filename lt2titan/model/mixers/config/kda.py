"""``[model.mixers.kda]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.config.section import require
from lt2titan.model.mixers.config.sizes import check_expansion, divisors


@dataclass(kw_only=True, slots=True)
class KDAConfig:
    """Kimi delta attention: S <- (I - b k k^T) Diag(a) S + b k v^T with a decay per channel (arXiv 2510.26692)."""

    n_heads: int = 16
    """Heads of queries and keys, dim / n_heads wide."""
    n_v_heads: int = 0
    """Heads of values (grouped values), a multiple of n_heads; 0 means as many as n_heads."""
    expand_v: float = 1.0
    """Total value width as a multiple of dim."""
    conv_size: int = 4
    """Taps of the causal depthwise convolution on q, k and v."""
    allow_neg_eigval: bool = False
    """Let b reach 2, so that a transition may have negative eigenvalues (arXiv 2411.12537)."""
    bounded_gate: bool = False
    """log a = lower_bound * sigmoid(..) instead of -exp(A_log) * softplus(..): it cannot run away, and fla's
    kernels may use tensor cores for it."""
    lower_bound: float = -5.0
    """Least log a with bounded_gate, from -5 up to 0 (e^-5 forgets all but 0.7 %)."""

    def validate(self, dim: int) -> None:
        require(self.n_heads > 0, self, "n_heads", "must be positive")
        require(
            dim % self.n_heads == 0,
            self,
            "n_heads",
            f"does not divide dim {dim}; these do: {divisors(dim)}",
        )
        require(
            self.n_v_heads >= 0 and self.n_v_heads % self.n_heads == 0,
            self,
            "n_v_heads",
            f"must be 0 or a multiple of n_heads {self.n_heads}",
        )
        heads_field = "n_v_heads" if self.n_v_heads else "n_heads"
        check_expansion(self, "expand_v", dim, getattr(self, heads_field), heads_field)
        require(self.conv_size >= 2, self, "conv_size", "must be at least 2 taps")
        require(-5 <= self.lower_bound < 0, self, "lower_bound", "must lie in [-5, 0)")
