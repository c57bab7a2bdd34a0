"""Continue a prompt with a trained model; its shape, weights and tokenizer come from the checkpoint."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lt2titan.checkpoint.storage import CheckpointError
from lt2titan.config.loader import ConfigFileError
from lt2titan.config.section import ConfigError
from lt2titan.data.tokenizer import build_tokenizer
from lt2titan.inference.generate import generate
from lt2titan.inference.load import load_model, pick_device
from lt2titan.metrics.logging import init_logging


@dataclass(kw_only=True)
class Arguments:
    """Continue a prompt with a trained model."""

    checkpoint: Path
    """A step folder, a run folder (its newest valid checkpoint), or a converted file."""
    prompt: str
    """Text to continue."""
    max_new_tokens: int = 128
    """Stop after this many tokens, or at the end of the document."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_p: float = 0.95
    """Sample among the fewest likeliest tokens whose probabilities sum to at least this; 1 for all."""
    seed: int = 0
    """Seed of the sampling."""
    device: str = "auto"
    """cpu, cuda, or auto: the GPU if there is one."""
    backend: Literal["auto", "reference", "fla"] = "auto"
    """Operators: fla's kernels on a GPU, plain PyTorch (reference), or auto."""
    tokenizer: str = ""
    """Tokenizer, if it no longer lies where the run had it."""

    def problem(self) -> str:
        """What is wrong with the arguments, or ""."""
        if self.max_new_tokens < 1:
            return f"--max-new-tokens = {self.max_new_tokens}: must be positive"
        if self.temperature < 0:
            return f"--temperature = {self.temperature}: must not be negative"
        if not 0 < self.top_p <= 1:
            return f"--top-p = {self.top_p}: must be in (0, 1]"
        return ""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if problem := arguments.problem():
        sys.exit(f"generate: {problem}")
    init_logging()
    try:
        model, config = load_model(arguments.checkpoint, pick_device(arguments.device), arguments.backend)
        config.data.tokenizer = arguments.tokenizer or config.data.tokenizer
        tokenizer = build_tokenizer(config.data)
    except (CheckpointError, ConfigError, ConfigFileError) as error:
        hint = " (--tokenizer names another place)" if "tokenizer" in str(error) else ""
        sys.exit(f"generate: {error}{hint}")
    if tokenizer.n_tokens > config.model.vocab_size:
        sys.exit(
            f"generate: the tokenizer {config.data.tokenizer!r} has {tokenizer.n_tokens} tokens and the model only "
            f"{config.model.vocab_size}: give the run's own with --tokenizer (a run on synthetic tokens has none)"
        )
    tokens = tokenizer.encode(arguments.prompt, bos=config.data.add_bos)
    new_tokens = generate(
        model,
        tokens,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        eos_id=tokenizer.eos_id,
    )
    print(arguments.prompt + tokenizer.decode(list(new_tokens)))


if __name__ == "__main__":
    main()
