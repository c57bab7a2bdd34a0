"""What a training step asks of layers that learn to choose what attention sees (mixers/dsa.py): functions of the step,
so that all ranks and a resumed run agree."""

from __future__ import annotations

from torch import Tensor

from lt2titan.model.config import ModelConfig


class IndexerSchedule:
    """When attention sees everything, and how the indexers' loss counts. Of a model without such layers: never, and
    not at all.

    Args:
        config: a validated ``[model]``.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config.mixers.dsa
        self._n_layers = config.layer_mixers.count("dsa")
        self._n_loops = config.n_loops

    @property
    def is_needed(self) -> bool:
        """Whether the model has indexers."""
        return self._n_layers > 0

    def sees_all(self, step: int) -> bool:
        """Whether ``step`` (counted from 1) is one of the warm-up, in which attention sees every earlier token. Before
        the first step (0) it does, if there is a warm-up."""
        return self.is_needed and step <= self._config.warmup_steps and self._config.warmup_steps > 0

    def phases(self, first_step: int, last_step: int) -> list[bool]:
        """The values that `sees_all` takes in these steps."""
        return sorted({self.sees_all(first_step), self.sees_all(last_step)})

    def n_visits(self, n_loops: int, n_backward_loops: int) -> int:
        """Visits of layers whose indexers learn, of a step that runs ``n_loops`` and has gradients in the last
        ``n_backward_loops`` of them."""
        loops = range(n_loops - n_backward_loops, n_loops)
        return self._n_layers * sum(loop % self._config.reuse_every == 0 for loop in loops)

    def objective(self, kl: Tensor, n_tokens: int) -> Tensor:
        """What is added to the objective for a microbatch's ``kl``, summed over tokens, layers and loops.

        Args:
            n_tokens: of the whole step, on all ranks.
        """
        return self._config.kl_weight * kl / n_tokens

    def describe(self) -> str:
        """For the log."""
        n_steps = self._config.warmup_steps
        start = f"attention sees all earlier tokens for {n_steps} steps, then" if n_steps else "attention sees"
        text = f"{start} the {self._config.top_k} that its indexer chooses"
        if self._config.reuse_every > 1:
            text += f", anew in one of {self._config.reuse_every} loops"
        return f"{text}; weight of the indexers' loss {self._config.kl_weight:g}"
