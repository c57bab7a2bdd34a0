"""Runs of a GDN+DSA model whose indexers first learn from all keys, then from the chosen ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import metrics, train

N_STEPS, N_WARMUP = 8, 4
MODEL = ["--model.hybrid.mixer", "dsa", "--model.mixers.dsa.n_heads", "2", "--model.mixers.dsa.n_kv_heads", "2"]
MODEL += ["--model.mixers.dsa.top_k", "8", "--model.mixers.dsa.warmup_steps", str(N_WARMUP)]
MODEL += ["--model.mixers.dsa.n_index_heads", "2", "--model.mixers.dsa.index_head_dim", "8"]
RUN = ["--training.steps", str(N_STEPS), "--lr_scheduler.total_steps", str(N_STEPS), "--validation.freq", "4"]
FIGURES = ("step", "loss", "grad_norm", "indexer_kl", "grad_norm/indexer")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indexers")
    output = " ".join(train(folder, *MODEL, *RUN).split())
    assert f"attention sees all earlier tokens for {N_WARMUP} steps, then the 8 that its indexer chooses" in output
    return folder


def test_the_indexers_loss_is_a_figure_of_its_own(straight: Path) -> None:
    records = metrics(straight)
    assert all(record["indexer_kl"] > 0 and record["grad_norm/indexer"] > 0 for record in records)
    # Over fewer keys two distributions differ by less.
    assert records[N_WARMUP]["indexer_kl"] < records[N_WARMUP - 1]["indexer_kl"]
    flops = [record["tflops"] / record["tokens_per_second"] for record in records]
    assert flops[0] == pytest.approx(flops[N_WARMUP - 1]) and flops[0] > 1.001 * flops[N_WARMUP]


def test_the_weight_of_the_kl_changes_nothing_but_the_indexers(straight: Path, tmp_path: Path) -> None:
    """While attention sees everything, bitwise: losses, gradient norms, validation."""
    train(tmp_path, *MODEL, *RUN, "--training.steps", str(N_WARMUP), "--model.mixers.dsa.kl_weight", "0")
    heavy, without = metrics(straight)[:N_WARMUP], metrics(tmp_path)
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in heavy] == [r[key] for r in without], key
    assert (
        metrics(straight, "validation_loss")[0]["validation_loss"]
        == metrics(tmp_path, "validation_loss")[0]["validation_loss"]
    )
    assert [r["grad_norm/indexer"] for r in without] == [0.0] * N_WARMUP
    assert heavy[-1]["indexer_kl"] < without[-1]["indexer_kl"]


@pytest.mark.parametrize("n_first", [3, 6], ids=["in the first phase", "in the second"])
def test_a_resumed_run_goes_on_in_its_phase_bitwise(straight: Path, tmp_path: Path, n_first: int) -> None:
    train(tmp_path, *MODEL, *RUN, "--training.steps", str(n_first))
    assert "resuming from" in train(tmp_path, *MODEL, *RUN)
    for key in FIGURES:
        assert [r[key] for r in metrics(tmp_path)] == [r[key] for r in metrics(straight)], key


def test_two_ranks_with_accumulation_learn_the_same(straight: Path, tmp_path: Path) -> None:
    train(tmp_path, *MODEL, *RUN, "--training.local_batch_size", "1", n_ranks=2)
    for key in FIGURES:
        ours, theirs = ([r[key] for r in metrics(folder)] for folder in (tmp_path, straight))
        assert ours == pytest.approx(theirs, rel=1e-3), key


def test_compiled_runs_know_both_phases_before_the_first_step(tmp_path: Path) -> None:
    """And say so if they had to compile another graph."""
    output = train(
        tmp_path,
        *MODEL,
        *RUN,
        "--compile.enable",
        "--compile.backend",
        "aot_eager",
        "--compile.error_on_recompile",
        "--model.n_loops",
        "3",
        "--model.mixers.dsa.reuse_every",
        "2",
        "--model.loop.backward_loops",
        "2",
    )
    assert "torch.compile:" in output and [r["step"] for r in metrics(tmp_path)] == list(range(1, N_STEPS + 1))
