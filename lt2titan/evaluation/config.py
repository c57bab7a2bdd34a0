"""``[validation]``. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from lt2titan.config.section import require


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """Loss and bits per byte on held-out text, weighted by tokens."""

    enable: bool = True
    """Validate every freq steps and after the last."""
    freq: int = 500
    """Steps between validations."""
    steps: int = -1
    """Batches per rank and validation; -1 means all of the held-out text."""
    local_batch_size: int = 0
    """Sequences per rank and batch; 0 means training.local_batch_size."""
    seq_len: int = 0
    """Tokens per sequence; 0 means training.seq_len."""
    dataset: str = ""
    """Kind of source; "" means training.dataset."""
    dataset_path: str = ""
    """Where the text lies; "" holds whole documents out of the training text (data.holdout_documents)."""
    loops: list[int] = field(default_factory=list)
    """Report validation_loss/loops_n for these numbers of loops too, each 1 to model.n_loops, at the price of one more
    head each; validation_loss is always that of model.n_loops."""

    def validate(self) -> None:
        require(self.freq > 0, self, "freq", "must be positive; validation.no_enable turns validation off")
        require(self.steps == -1 or self.steps > 0, self, "steps", "must be positive, or -1 for all")
        require(self.local_batch_size >= 0, self, "local_batch_size", "must be positive, or 0 for training's")
        is_set = len(set(self.loops)) == len(self.loops)
        require(is_set and all(n > 0 for n in self.loops), self, "loops", "must be different positive numbers")
        require(self.seq_len >= 0, self, "seq_len", "must be positive, or 0 for training's")

    def validate_model(self, n_loops: int) -> None:
        """Refuse loops that a model of ``n_loops`` does not have."""
        reason = f"there are no more than model.n_loops = {n_loops} loops; leave larger numbers out"
        require(all(n <= n_loops for n in self.loops), self, "loops", reason)
