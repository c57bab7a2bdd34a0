"""Validation loss and bits per byte of a checkpoint on given files.

python scripts/evaluate.py --checkpoint outputs/run --files 'held_out/*.parquet'
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lt2titan.checkpoint.storage import CheckpointError
from lt2titan.config.loader import ConfigFileError
from lt2titan.config.section import ConfigError
from lt2titan.data.check import is_same_text, validation_text
from lt2titan.data.errors import DataError
from lt2titan.data.loader import build_validation_loader
from lt2titan.evaluation.validate import evaluate
from lt2titan.inference.load import load_model, pick_device
from lt2titan.metrics.logging import init_logging


@dataclass(kw_only=True)
class Arguments:
    """Validation loss and bits per byte of a checkpoint."""

    checkpoint: Path
    """A step folder, a run folder (its newest valid checkpoint), or a converted file."""
    files: str = ""
    """Text, .jsonl or .parquet files: a path, folder, glob pattern or a list with commas. "" evaluates on the text
    that the run held out for its validation."""
    text_column: str = ""
    """Column that holds the text; "" takes the run's."""
    tokenizer: str = ""
    """Tokenizer, if it no longer lies where the run had it."""
    seq_len: int = 0
    """Tokens per sequence; 0 takes the run's."""
    batch_size: int = 8
    """Sequences per batch."""
    steps: int = -1
    """Batches; -1 for all of the text."""
    loops: tuple[int, ...] = ()
    """Losses after these numbers of loops too; nothing takes the run's validation.loops."""
    device: str = "auto"
    """cpu, cuda, or auto: the GPU if there is one."""
    backend: Literal["auto", "reference", "fla"] = "auto"
    """Operators: fla's kernels on a GPU, plain PyTorch (reference), or auto."""
    json: bool = False
    """Print one JSON object."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    init_logging()
    if arguments.steps == 0 or arguments.steps < -1 or arguments.batch_size < 1:
        sys.exit("evaluate: --steps and --batch-size must be positive (--steps -1 for all of the text)")
    try:
        device = pick_device(arguments.device)
        model, config = load_model(arguments.checkpoint, device, arguments.backend)
        config.data.tokenizer = arguments.tokenizer or config.data.tokenizer
        config.data.text_column = arguments.text_column or config.data.text_column
        validation, training = config.validation, config.training
        training_text = (training.dataset, training.dataset_path)
        source = validation_text(training_text, validation.dataset, validation.dataset_path)
        held_out = is_same_text(source, training_text)
        batches = build_validation_loader(
            config.data,
            dataset="files" if arguments.files else source[0],
            dataset_path=arguments.files or source[1],
            seq_len=arguments.seq_len or validation.seq_len or training.seq_len,
            local_batch_size=arguments.batch_size,
            dp_rank=0,
            dp_size=1,
            vocab_size=config.model.vocab_size,
            steps=arguments.steps,
            holdout=held_out and not arguments.files,
        )
        validation.loops = list(arguments.loops) or validation.loops
        validation.validate()
        validation.validate_model(config.model.n_loops)
        result = evaluate(model, batches, device, validation.loops)
    except (CheckpointError, ConfigError, ConfigFileError, DataError) as error:
        hint = " (--tokenizer names another place)" if "tokenizer" in str(error) else ""
        sys.exit(f"evaluate: {error}{hint}")
    if arguments.json:
        print(json.dumps(result._asdict()))
    else:
        print(
            f"loss {result.loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte, "
            f"{result.n_tokens:,} tokens"
        )
        for n_loops, loss in result.loss_at.items():
            print(f"with {n_loops} loops: loss {loss:.4f}")


if __name__ == "__main__":
    main()
