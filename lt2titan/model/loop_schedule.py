"""How many loops a training step runs: a function of (seed, step), so that all ranks and a resumed run agree."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

from lt2titan.model.config import LoopConfig


class LoopSchedule:
    """The number of loops T of each step, and of those that gradients pass through.

    Sampled schedules draw from a fixed distribution by one uniform number, a hash of (seed, step): nothing is stored,
    no generator is shared, and no rank has to ask another.

    Args:
        config: a validated ``[model.loop]``.
        n_loops: the largest T, as many as were built.
        seed: of sampled schedules.
    """

    def __init__(self, config: LoopConfig, n_loops: int, seed: int) -> None:
        self.config, self.n_loops, self.seed = config, n_loops, seed
        self._probabilities = _probabilities(config, n_loops)

    def loops(self, step: int) -> int:
        """T of ``step`` (counted from 1)."""
        if self.config.schedule == "grow":
            n_more = self.n_loops - self.config.min_loops
            return self.config.min_loops + min((step - 1) * n_more // self.config.grow_steps, n_more)
        u, below = _uniform(self.seed, step), 0.0
        for n, probability in self._probabilities.items():
            below += probability
            if u < below:
                return n
        return n  # the probabilities add up to 1 but for rounding

    def backward_loops(self, n_loops: int) -> int:
        """How many of ``n_loops`` executed loops gradients pass through: the last ones."""
        return min(self.config.backward_loops or n_loops, n_loops)

    def shares(self, n_steps: int) -> dict[int, float]:
        """T -> expected share of the steps 1..n_steps that run T loops; of a growing schedule the exact one."""
        if self.config.schedule != "grow":
            return dict(self._probabilities)
        counts = Counter(self.loops(step) for step in range(1, n_steps + 1))
        return {n: count / n_steps for n, count in sorted(counts.items())}

    def mean(self, n_steps: int) -> float:
        """Expected mean of T over the steps 1..n_steps."""
        return sum(n * share for n, share in self.shares(n_steps).items())

    def describe(self, n_steps: int) -> str:
        """For the log."""
        config, n_most = self.config, self.n_loops
        if config.schedule == "fixed":
            text = f"{n_most} loops in every step"
        elif config.schedule == "grow":
            text = f"{config.min_loops} loops growing to {n_most} over {config.grow_steps} steps"
        else:
            shares = ", ".join(f"{n}: {share:.3f}" for n, share in self._probabilities.items())
            text = f"loops of each step sampled ({config.schedule}; {shares})"
        text += f", mean {self.mean(n_steps):.3g}" if config.schedule != "fixed" else ""
        return text + (f", gradients through the last {config.backward_loops}" if config.backward_loops else "")


def _probabilities(config: LoopConfig, n_loops: int) -> dict[int, float]:
    """T -> its probability, in ascending order, none of them 0; empty for a growing schedule."""
    if config.schedule == "grow":
        return {}
    if config.schedule == "fixed":
        return {n_loops: 1.0}
    if config.schedule == "list":
        return {n: count / len(config.loops) for n, count in sorted(Counter(config.loops).items())}
    counts = range(config.min_loops, n_loops + 1)
    if config.schedule == "uniform":
        return {n: 1 / len(counts) for n in counts}
    weights = {n: poisson_lognormal(n - 1, config.mean_loops - 1, config.sigma) for n in counts}
    total = sum(weights.values())
    return {n: weight / total for n, weight in weights.items() if weight > 0}


def poisson_lognormal(k: int, mean: float, sigma: float) -> float:
    """P(X = k) for X ~ Poisson(e^tau), tau ~ N(log(mean) - sigma^2 / 2, sigma^2), so that E[X] = mean.

    The number of loops of Huginn (arXiv 2502.05171, section 3.3) is X + 1. The integral over tau is a sum over a grid
    of +-10 sigma, which converges exponentially for a smooth integrand that vanishes at both ends.
    """
    step, centre = 1 / 64, math.log(mean) - sigma**2 / 2
    total = 0.0
    for i in range(-640, 641):
        z = i * step
        tau = centre + sigma * z
        total += math.exp(k * tau - math.exp(tau) - math.lgamma(k + 1) - z * z / 2)
    return total * step / math.sqrt(2 * math.pi)


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) from a hash, the same on every machine and in every version of Python."""
    digest = hashlib.blake2b(f"loops of step {step}, seed {seed}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
