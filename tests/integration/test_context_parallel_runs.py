"""Runs whose rows are split over two ranks: validation at another length, and resumption without the split."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import losses, metrics, train

PACKED = ["--training.dataset", "files", "--model.vocab_size", "264", "--data.document_mask"]
RUN = ["--training.steps", "8", "--validation.freq", "4", "--validation.seq_len", "16", "--data.holdout_documents", "4"]
SPLIT = ["--parallelism.context_parallel_degree", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Documents of many lengths, of which rows of 32 hold several, and some hold parts of one."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"{i} words and " * (1 + i % 9), encoding="utf-8")
    return [*PACKED, *RUN, "--training.dataset_path", f"{folder}/*.txt"]


@pytest.fixture(scope="module")
def whole(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(folder, *text)
    return folder


def test_split_rows_train_and_validate_as_whole_ones(text: list[str], whole: Path, tmp_path: Path) -> None:
    output = train(tmp_path, *text, *SPLIT, n_ranks=2)
    assert "context parallelism over 2 ranks" in output
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)
    assert [r["tokens_seen"] for r in metrics(tmp_path)] == [r["tokens_seen"] for r in metrics(whole)]
    for key in ("validation_loss", "bits_per_byte", "exit_loss/loop_1", "first_token_mass/loop_2"):
        ours, theirs = metrics(tmp_path, key), metrics(whole, key)
        assert len(theirs) == 2
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in theirs], rel=1e-4), key


def test_a_split_run_goes_on_without_the_split(text: list[str], whole: Path, tmp_path: Path) -> None:
    train(tmp_path, *text, *SPLIT, "--training.steps", "5", "--lr_scheduler.total_steps", "8", n_ranks=2)
    assert "resuming from" in train(tmp_path, *text, "--lr_scheduler.total_steps", "8")
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-4)
