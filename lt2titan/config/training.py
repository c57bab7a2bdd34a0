"""``[training]``, ``[job]`` and ``[debug]``: the run as a whole. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lt2titan.config.section import ConfigError, require
from lt2titan.data.config import require_dataset


@dataclass(kw_only=True, slots=True)
class JobSection:
    """The run and its folder."""

    config_file: str = "train_configs/lt2_debug.toml"
    """TOML file to start from; run_train.sh passes CONFIG_FILE."""
    dump_folder: str = "outputs/run"
    """Run folder: checkpoints, metrics, resolved config. One that holds a checkpoint is resumed."""
    description: str = ""
    """A sentence about the run, kept with it."""
    print_config: bool = False
    """Print the resolved configuration at start."""

    def validate(self) -> None:
        require(bool(self.dump_folder.strip()), self, "dump_folder", "must name a folder")


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Data, batch, length and precision of the run."""

    dataset: str = "python_docs"
    """Kind of source: python_docs (built in), synthetic, files (txt, jsonl, parquet) or huggingface."""
    dataset_path: str = ""
    """files: glob pattern, folder or list of them; huggingface: a dataset's name or local files."""
    steps: int = 1000
    """Optimizer steps after which to stop (the schedule has its own horizon: lr_scheduler.total_steps)."""
    local_batch_size: int = 8
    """Sequences per data-parallel rank and microbatch; 0 divides global_batch_size over the ranks, without
    accumulation."""
    global_batch_size: int = -1
    """Sequences per optimizer step over all ranks; what one microbatch of each does not hold is accumulated. -1 means
    local_batch_size x data-parallel ranks."""
    seq_len: int = 256
    """Tokens per sequence."""
    max_norm: float = 1.0
    """Clip the gradient to this global norm."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of compute and all-gathers; auto: bfloat16 on GPU, float32 on CPU. Master weights are float32."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """Precision of the gradient reduction."""
    max_skipped_steps: int = 5
    """Stop after this many steps in a row with a non-finite loss or gradient (each is skipped, none is applied)."""
    gc_freq: int = 50
    """Steps between Python garbage collections, on all ranks together."""

    def validate(self) -> None:
        require_dataset(self)
        for name in ("steps", "seq_len", "max_norm", "max_skipped_steps", "gc_freq"):
            require(getattr(self, name) > 0, self, name, "must be positive")
        batch = self.global_batch_size
        require(batch == -1 or batch > 0, self, "global_batch_size", "must be positive, or -1")
        require(self.local_batch_size >= 0, self, "local_batch_size", "must be positive, or 0")
        both_open = batch == -1 and self.local_batch_size == 0
        require(not both_open, self, "local_batch_size", "can only be 0 when global_batch_size is given")

    def microbatches(self, dp_size: int) -> tuple[int, int]:
        """(sequences per rank and microbatch, microbatches per optimizer step) on ``dp_size`` data-parallel ranks.

        Raises:
            ConfigError: the global batch cannot be divided so.
        """
        local, total = self.local_batch_size, self.global_batch_size
        if total == -1:
            return local, 1
        n_microbatches, rest = divmod(total, max(local, 1) * dp_size)
        if rest or not n_microbatches:
            at_once = f"local_batch_size x data-parallel ranks = {local} x {dp_size} = {local * dp_size}"
            parts = at_once if local else f"the {dp_size} data-parallel ranks"
            raise ConfigError("global_batch_size", total, f"is no multiple of {parts}; use one that is")
        return (local, n_microbatches) if local else (n_microbatches, 1)


@dataclass(kw_only=True, slots=True)
class DebugConfig:
    """Seeds and determinism."""

    seed: int = 42
    """Seed of the model's initialisation and of sampled loops (model.loop.schedule); the order of the data has its own
    (data.seed)."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms (slower on GPU; CPU runs repeat bitwise without it)."""

    def validate(self) -> None:
        require(self.seed >= 0, self, "seed", "must not be negative")
