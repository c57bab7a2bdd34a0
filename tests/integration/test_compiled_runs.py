"""Compiled runs of the real launcher against eager ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import launch, losses, metrics, train

COMPILED = ["--compile.enable", "--compile.backend", "aot_eager", "--compile.error_on_recompile"]
PACKED = ["--data.document_mask", "--data.max_documents_per_sample", "16"]


def check_same(ours: Path, theirs: Path) -> None:
    """Equal to rounding at first; sums in another order then grow apart."""
    assert losses(ours)[:8] == pytest.approx(losses(theirs)[:8], rel=1e-5)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-3)
    validations = [[r["validation_loss"] for r in metrics(run, "validation_loss")] for run in (ours, theirs)]
    assert validations[0] == pytest.approx(validations[1], rel=1e-3)


def test_two_compiled_ranks_whose_checkpoint_an_eager_one_continues(tmp_path: Path) -> None:
    """Packed documents, recomputed blocks, accumulation: no graph more than the warm-up made."""
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    train(eager, *PACKED)
    layout = ["--training.local_batch_size", "1", "--activation_checkpoint.mode", "block"]
    horizon = ["--lr_scheduler.total_steps", "20", "--training.steps"]
    output = train(compiled, *PACKED, *COMPILED, *layout, *horizon, "10", n_ranks=2)
    assert re.search(r"torch.compile: 3 blocks as 2 graphs", output)
    # Two kinds of blocks and the loss, with gradients and without.
    assert re.search(r"torch.compile: 6 graphs in \d+\.\d s \(with 2 loops and a validation batch\)", output)
    assert "resuming from" in train(compiled, *PACKED, *horizon, "20")
    check_same(compiled, eager)


@pytest.mark.wide
def test_a_batch_of_another_shape_ends_a_strict_run(tmp_path: Path) -> None:
    """Batches of 32 tokens that have more than one document, with room for one."""
    overrides = ["--data.document_mask", "--data.max_documents_per_sample", "1", "--validation.no_enable"]
    result = launch(tmp_path, *COMPILED, *overrides)
    assert result.returncode != 0
    assert "compile.error_on_recompile" in result.stdout and "data.max_documents_per_sample" in result.stdout


@pytest.mark.wide
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["--model.loop.schedule", "uniform"], id="sampled loops"),
        pytest.param(["--model.loop.windows", "-1", "8", "--model.loop.schedule", "uniform"], id="windows"),
        pytest.param(
            ["--validation.local_batch_size", "2", "--validation.seq_len", "16"], id="another validation shape"
        ),
    ],
)
def test_one_compiled_rank(tmp_path: Path, overrides: list[str]) -> None:
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    train(eager, *overrides)
    train(compiled, *overrides, *COMPILED)
    check_same(compiled, eager)
