"""Continue prompts with a trained model; its shape, weights and tokenizer come from the checkpoint.

Text goes to standard output, one prompt's as it is made; messages and speed go to standard error
(on a GPU the first pass also compiles kernels).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from lt2titan.checkpoint.storage import CheckpointError
from lt2titan.config.loader import ConfigFileError
from lt2titan.config.section import ConfigError
from lt2titan.data.tokenizer import build_tokenizer
from lt2titan.inference.detokenize import TextStream
from lt2titan.inference.generate import generate
from lt2titan.inference.load import load_model, pick_device
from lt2titan.inference.speed import Speed
from lt2titan.metrics.logging import init_logging


@dataclass(kw_only=True)
class Arguments:
    """Continue prompts with a trained model."""

    checkpoint: Path
    """A step folder, a run folder (its newest valid checkpoint), or a converted file."""
    prompt: list[str] = field(default_factory=list)
    """Texts to continue, one or several."""
    prompt_file: str = ""
    """UTF-8 file with one text to continue per line (empty lines are left out), instead of --prompt."""
    batch_size: int = 16
    """Prompts that are continued together."""
    max_new_tokens: int = 128
    """Stop after this many tokens, or at the end of the document."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_p: float = 0.95
    """Sample among the fewest likeliest tokens whose probabilities sum to at least this; 1 for all."""
    seed: int = 0
    """Seed of the sampling: prompt i, from 0, draws with seed + i, whatever its neighbours are."""
    device: str = "auto"
    """cpu, cuda, or auto: the GPU if there is one."""
    backend: Literal["auto", "reference", "fla"] = "auto"
    """Operators: fla's kernels on a GPU, plain PyTorch (reference), or auto."""
    tokenizer: str = ""
    """Tokenizer, if it no longer lies where the run had it."""

    def problem(self) -> str:
        """What is wrong with the arguments, or ""."""
        if bool(self.prompt) == bool(self.prompt_file):
            return "give either --prompt or --prompt-file"
        if self.batch_size < 1:
            return f"--batch-size = {self.batch_size}: must be positive"
        if self.max_new_tokens < 1:
            return f"--max-new-tokens = {self.max_new_tokens}: must be positive"
        if not 0 <= self.temperature < math.inf:
            return f"--temperature = {self.temperature}: must be finite and not negative"
        if not 0 < self.top_p <= 1:
            return f"--top-p = {self.top_p}: must be in (0, 1]"
        return ""


def read_prompts(arguments: Arguments) -> list[str]:
    """The texts to continue, at least one."""
    if arguments.prompt:
        return arguments.prompt
    try:
        lines = Path(arguments.prompt_file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"generate: --prompt-file {arguments.prompt_file!r} cannot be read: {error}")
    prompts = [line for line in (line.rstrip("\r") for line in lines) if line]
    if not prompts:
        sys.exit(f"generate: --prompt-file {arguments.prompt_file!r} has no prompt; write one per line")
    return prompts


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if problem := arguments.problem():
        sys.exit(f"generate: {problem}")
    texts = read_prompts(arguments)
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
    prompts = [tokenizer.encode(text, bos=config.data.add_bos) for text in texts]
    if [] in prompts:
        sys.exit("generate: a prompt is empty and the model knows no beginning of a document: give some text")
    speed = Speed()
    for first in range(0, len(prompts), arguments.batch_size):
        batch = prompts[first : first + arguments.batch_size]
        new_tokens = generate(
            model,
            batch,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed + first,
            eos_id=tokenizer.eos_id,
        )
        streams = [TextStream(tokenizer, prompt) for prompt in batch]
        if len(texts) == 1:
            print(texts[0], end="", flush=True)
            for _, token in speed.timed(new_tokens, batch):
                print(streams[0].push(token), end="", flush=True)
            print(streams[0].end())
            continue
        pieces: list[list[str]] = [[] for _ in batch]
        for i, token in speed.timed(new_tokens, batch):
            pieces[i].append(streams[i].push(token))
            if token == tokenizer.eos_id or len(pieces[i]) == arguments.max_new_tokens:  # several: each as it ends
                print(f"--- {first + i}\n{texts[first + i]}{''.join(pieces[i])}{streams[i].end()}", flush=True)
    print(f"generate: {speed}", file=sys.stderr)


if __name__ == "__main__":
    main()
