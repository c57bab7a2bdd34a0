"""scripts/generate.py on a small checkpoint, in this process."""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch

from lt2titan.checkpoint.convert import write_model_state
from lt2titan.config.job import JobConfig
from lt2titan.config.loader import to_toml
from lt2titan.inference.generate import generate
from lt2titan.inference.load import load_model
from lt2titan.model.config import ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.mixers.config import GDNConfig, MixersConfig

SCRIPT = Path(__file__).parents[3] / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ModelConfig(
        vocab_size=258, dim=16, n_layers=1, n_loops=2, ffn_dim=24, mixers=MixersConfig(gdn=GDNConfig(n_heads=2))
    )
    weights = build_on_meta(model, "reference")
    materialise(weights, torch.device("cpu"), seed=0)
    config = JobConfig(model=model)
    config.data.tokenizer = "bytes"
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    write_model_state(path, weights.state_dict(), to_toml(config))
    return path


@pytest.fixture
def run(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    logger = logging.getLogger("lt2titan")  # the script directs it to a stream that is gone after the test
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.setattr(logger, "level", logger.level)

    def run(*arguments: str) -> tuple[str, str]:
        """Standard output and error, the latter ending with the reason for which it stopped, if it did."""
        options = ["--checkpoint", str(checkpoint), "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            return capsys.readouterr().out, str(stop.code)
        return capsys.readouterr()

    return run


def continued(checkpoint: Path, prompt: str, seed: int, n: int = 12) -> str:
    """What the script must print for a prompt: all at once, from the tokens."""
    model, config = load_model(checkpoint, torch.device("cpu"))
    tokens = [256] * config.data.add_bos + list(prompt.encode())
    options = {"temperature": 0.8, "top_p": 0.95, "seed": seed, "eos_id": 257}
    new = [token for _, token in generate(model, [tokens], max_new_tokens=n, **options)]  # type: ignore[arg-type]
    return prompt + bytes(token for token in new if token < 256).decode(errors="replace")


def test_one_prompt_streams_its_text(run, checkpoint: Path) -> None:  # type: ignore[no-untyped-def]
    out, err = run("--prompt", "Naïve ", "--max-new-tokens", "12", "--seed", "3")
    assert out == continued(checkpoint, "Naïve ", seed=3) + "\n"
    assert "prefill 8 tokens" in err and "decode 11 tokens" in err and "tokens/s" in err


def test_several_prompts_from_arguments_or_a_file(run, checkpoint: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    prompts = ["The ", "a much longer prompt 東", "x"]
    expected = "".join(f"--- {i}\n{continued(checkpoint, prompt, seed=i)}\n" for i, prompt in enumerate(prompts))
    out, err = run("--prompt", *prompts, "--max-new-tokens", "12", "--batch-size", "2")
    assert out == expected
    assert "decode 33 tokens" in err
    file = tmp_path / "prompts.txt"
    file.write_bytes("\r\n\n".join(prompts).encode())
    assert run("--prompt-file", str(file), "--max-new-tokens", "12")[0] == expected


def test_what_cannot_work_is_refused_with_the_way_out(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    for arguments, reason in (
        ((), "give either --prompt or --prompt-file"),
        (("--prompt", "a", "--prompt-file", "b"), "give either --prompt or --prompt-file"),
        (("--prompt-file", str(tmp_path / "none.txt")), "cannot be read"),
        (("--prompt-file", str(empty)), "write one per line"),
        (("--prompt", "a", "--batch-size", "0"), "--batch-size = 0: must be positive"),
        (("--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens = 0: must be positive"),
    ):
        out, problem = run(*arguments)
        assert reason in problem and out == ""
