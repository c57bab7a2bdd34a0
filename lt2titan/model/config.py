"""``[model]``: the shape of an LT2 model. Imports without torch.

Names and defaults follow the LT2 paper (arXiv 2605.20670); presets are the TOML files in ``train_configs/``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lt2titan.config.section import ConfigError, require
from lt2titan.model.mixers.config import MixersConfig

FULL_WINDOW = -1
"""In ``loop.windows``: this loop attends to everything."""


@dataclass(kw_only=True, slots=True)
class HybridConfig:
    """A second, rare kind of mixer in the physical stack."""

    mixer: str = ""
    """The rare mixer ("" for none: every layer is model.mixer)."""
    ratio: int = 4
    """Common layers per rare layer (4 means 4:1)."""
    placement: Literal["interleave", "bookend", "front", "back"] = "interleave"
    """Where rare layers stand: the last of every ratio + 1, both ends of the stack, its bottom, or its top."""

    def validate(self) -> None:
        require(
            self.mixer in ("", *MixersConfig.names()),
            self,
            "mixer",
            f'must be "" or one of {MixersConfig.names()}',
        )
        require(self.ratio > 0, self, "ratio", "must be positive")


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """What happens between the passes over the stack, and how many of them a training step runs."""

    residual_gate: bool = True
    """Add rho_t * h(t-1) after loop t, rho zero-initialised, one vector per loop."""
    windows: list[int] = field(default_factory=list)
    """Attention window of softmax layers in each loop, n_loops entries, -1 for full; empty: each mixer's own. A step
    with fewer loops uses the first entries."""
    schedule: Literal["fixed", "uniform", "poisson_lognormal", "list", "grow"] = "fixed"
    """Loops of a training step, the same on all ranks: always n_loops; or sampled for each step from debug.seed,
    uniform on min_loops..n_loops, Poisson-lognormal (Huginn, arXiv 2502.05171) cut to that range, or out of the list
    loops; or growing from min_loops to n_loops over grow_steps. Fewer loops use the first rows of rho. Validation,
    decoding and export use n_loops."""
    min_loops: int = 1
    """uniform, poisson_lognormal and grow: the fewest loops of a step."""
    mean_loops: float = 0.0
    """poisson_lognormal: mean number of loops before the distribution is cut (r + 1 in the paper); more than 1. The
    mean that results stands in the log and in scripts/estimate.py."""
    sigma: float = 0.5
    """poisson_lognormal: standard deviation of the logarithm of the Poisson rate."""
    loops: list[int] = field(default_factory=list)
    """list: the numbers of loops to choose from, n_loops among them; name one twice to make it twice as likely."""
    grow_steps: int = 0
    """grow: from the step after these many on, n_loops are run; until then each number lasts equally long."""
    backward_loops: int = 0
    """Truncated backpropagation: gradients pass through this many of the last loops of a step; 0 for all. Loops
    without gradients cost a third, keep no activations and do not train their rho."""

    def validate(self) -> None:
        ok = all(w > 0 or w == FULL_WINDOW for w in self.windows)
        require(ok, self, "windows", "each entry must be positive, or -1 for full attention")
        readers = {
            "min_loops": ("uniform", "poisson_lognormal", "grow"),
            "mean_loops": ("poisson_lognormal",),
            "sigma": ("poisson_lognormal",),
            "loops": ("list",),
            "grow_steps": ("grow",),
        }
        defaults = LoopConfig()
        for name, schedules in readers.items():
            is_read = self.schedule in schedules or getattr(self, name) == getattr(defaults, name)
            reason = f"is not read by schedule = {self.schedule!r}; leave it out, or set schedule to "
            require(is_read, self, name, reason + " or ".join(map(repr, schedules)))
        require(self.min_loops > 0, self, "min_loops", "must be positive")
        require(self.backward_loops >= 0, self, "backward_loops", "must be positive, or 0 for all loops")
        require(0 < self.sigma <= 2, self, "sigma", "must be positive, and at most 2")
        if self.schedule == "poisson_lognormal":
            ok = self.mean_loops > 1 and self.mean_loops >= self.min_loops
            require(ok, self, "mean_loops", f"must be more than 1 and no less than min_loops = {self.min_loops}")
        if self.schedule == "list":
            require(bool(self.loops), self, "loops", "must name the numbers of loops for schedule = 'list'")
            require(min(self.loops) > 0, self, "loops", "each entry must be positive")
        if self.schedule == "grow":
            require(self.grow_steps > 0, self, "grow_steps", "must be positive for schedule = 'grow'")

    def validate_model(self, n_loops: int, tie_embeddings: bool) -> None:
        """Refuse what cannot be done with ``n_loops`` loops and a tied or untied head."""
        most = f"is more than n_loops = {n_loops}; lower it, or raise n_loops"
        for name in ("min_loops", "mean_loops", "backward_loops"):
            require(getattr(self, name) <= n_loops, self, name, most)
        if self.loops and max(self.loops) != n_loops:
            reason = f"its largest entry must be n_loops = {n_loops}, the most that is trained; change one of them"
            raise ConfigError("loops", self.loops, reason)
        if self.windows and len(self.windows) != n_loops:
            raise ConfigError("windows", self.windows, f"needs one entry per loop, n_loops is {n_loops}")
        fewest = min(self.counts(n_loops))
        if 0 < self.backward_loops < fewest and not tie_embeddings:
            reason = (
                f"no gradient would ever reach the embedding, as every step runs at least {fewest} loops; use 0 or at "
                f"least {fewest}, let some steps run fewer loops, or tie the embedding to the head (tie_embeddings)"
            )
            raise ConfigError("backward_loops", self.backward_loops, reason)

    def counts(self, n_loops: int) -> list[int]:
        """The numbers of loops that steps may run, of ``n_loops`` that are built."""
        if self.schedule == "fixed":
            return [n_loops]
        return self.loops if self.schedule == "list" else list(range(self.min_loops, n_loops + 1))


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A looped language model: embedding, n_layers blocks applied n_loops times with the same weights, head."""

    vocab_size: int = 258
    """Rows of the embedding; at least the tokenizer's size."""
    dim: int = 128
    """Width of the residual stream."""
    n_layers: int = 5
    """Distinct blocks in the physical stack."""
    n_loops: int = 4
    """Passes over the blocks (T); effective depth is n_layers * n_loops. The most that training runs, and what all else
    does; loop.schedule can train with fewer in some steps."""
    mixer: str = "gdn"
    """The common token mixer: a table of model.mixers."""
    ffn_dim: int = 0
    """SwiGLU width; 0 means int(8/3 dim) rounded up to a multiple of ffn_multiple_of."""
    ffn_multiple_of: int = 256
    """Rounding of the derived SwiGLU width."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding (rotate-half pairing) of softmax layers and RetNet."""
    tie_embeddings: bool = True
    """Use the embedding as the head's weight."""
    hybrid: HybridConfig = field(default_factory=HybridConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    mixers: MixersConfig = field(default_factory=MixersConfig)

    @property
    def ffn_width(self) -> int:
        if self.ffn_dim:
            return self.ffn_dim
        width = int(2 * (4 * self.dim) / 3)
        return -(-width // self.ffn_multiple_of) * self.ffn_multiple_of

    @property
    def layer_mixers(self) -> list[str]:
        """The mixer of each physical layer, bottom first.

        With ratio r, interleave makes layer i rare iff i mod (r + 1) = r; the other placements move the same number
        of rare layers, bookend giving its odd one to the top.
        """
        if not self.hybrid.mixer:
            return [self.mixer] * self.n_layers
        period = self.hybrid.ratio + 1
        interleaved = [i % period == self.hybrid.ratio for i in range(self.n_layers)]
        n_rare = sum(interleaved)
        first, last = range(n_rare), range(self.n_layers - n_rare, self.n_layers)
        rare = {
            "interleave": {i for i, is_rare in enumerate(interleaved) if is_rare},
            "bookend": {*first[: n_rare // 2], *last[n_rare // 2 :]},
            "front": {*first},
            "back": {*last},
        }[self.hybrid.placement]
        return [self.hybrid.mixer if i in rare else self.mixer for i in range(self.n_layers)]

    def validate(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_loops", "ffn_multiple_of", "norm_eps", "rope_theta"):
            require(getattr(self, name) > 0, self, name, "must be positive")
        require(self.ffn_dim >= 0, self, "ffn_dim", "must be positive, or 0 for the derived width")
        require(self.mixer in MixersConfig.names(), self, "mixer", f"must be one of {MixersConfig.names()}")
        self._validate_part("hybrid")
        self._validate_part("loop")
        if self.hybrid.mixer and self.hybrid.mixer not in self.layer_mixers:
            reason = f"{self.n_layers} layers hold no rare layer; lower it to at most {max(self.n_layers - 1, 1)}"
            raise ConfigError("hybrid.ratio", self.hybrid.ratio, reason)
        self._validate_part("loop", "validate_model", self.n_loops, self.tie_embeddings)
        if self.loop.windows and not {"full", "window"} & set(self.layer_mixers):
            raise ConfigError("loop.windows", self.loop.windows, "the model has no softmax layer to apply them to")
        for name in sorted(set(self.layer_mixers)):
            try:
                getattr(self.mixers, name).validate(self.dim)
            except ConfigError as error:
                raise ConfigError(f"mixers.{name}.{error.key}", error.value, error.reason) from None
        if "dsa" in self.layer_mixers:
            self._validate_that_indexers_learn()

    def _validate_that_indexers_learn(self) -> None:
        """Indexers have a gradient in loops that choose keys anew, if gradients pass through these."""
        every, n_backward = self.mixers.dsa.reuse_every, self.loop.backward_loops or self.n_loops
        counts = self.loop.counts(self.n_loops)
        if not any(loop % every == 0 for n in counts for loop in range(max(n - n_backward, 0), n)):
            reason = (
                f"layers of dsa choose keys anew in the first of every {every} loops (mixers.dsa.reuse_every), and "
                f"none of these is among the last {n_backward}: their indexers would never learn. Raise backward_loops "
                "or lower reuse_every"
            )
            raise ConfigError("loop.backward_loops", n_backward, reason)

    def _validate_part(self, name: str, method: str = "validate", *arguments: Any) -> None:
        try:
            getattr(getattr(self, name), method)(*arguments)
        except ConfigError as error:
            raise ConfigError(f"{name}.{error.key}", error.value, error.reason) from None
