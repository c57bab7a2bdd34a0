from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import byte_tokens, make_texts, write_edu_parquet

from lt2titan.data.config import DataConfig
from lt2titan.data.errors import DataError
from lt2titan.data.huggingface import HuggingFace
from lt2titan.data.loader import build_train_loader
from lt2titan.data.python_docs import PythonDocs
from lt2titan.data.shuffle import permutation, random_words
from lt2titan.data.sources import open_store, synthetic_store
from lt2titan.data.synthetic import N_SUCCESSORS, generate
from lt2titan.data.tokenizer import build_tokenizer

GOLDEN_PERMUTATION = [3, 2, 7, 0, 4, 1, 6, 5]
GOLDEN_WORDS = [1946289229809174724, 5646876236619196361]
GOLDEN_SYNTHETIC = [61, 40, 7, 85, 13, 23, 90, 37]
GOLDEN_BATCH = [301, 119, 212, 230, 103, 232, 312, 507, 144, 478, 436, 430, 101, 442, 273, 192]


def test_permutations_are_pinned() -> None:
    """Golden values: a change here would change the data order of every run."""
    assert permutation(8, "documents", 42, 0).tolist() == GOLDEN_PERMUTATION
    assert random_words(2, "golden").tolist() == GOLDEN_WORDS
    assert sorted(permutation(1000, 1).tolist()) == list(range(1000))
    assert permutation(1000, 1).tolist() != permutation(1000, 2).tolist()


def test_synthetic_is_a_seeded_markov_chain() -> None:
    tokens, offsets = generate(100, seed=0)
    again, _ = generate(100, seed=0)
    other, _ = generate(100, seed=1)
    assert np.array_equal(tokens, again) and not np.array_equal(tokens[:1000], other[:1000])
    assert tokens[:8].tolist() == GOLDEN_SYNTHETIC
    assert offsets[0] == 0 and offsets[-1] == len(tokens) and np.diff(offsets).min() >= 64
    inside = np.setdiff1d(np.arange(1, len(tokens)), offsets)
    bigrams = Counter(zip(tokens[inside - 1].tolist(), tokens[inside].tolist(), strict=True))
    n_successors = Counter(first for first, _ in bigrams)
    assert set(n_successors) == set(range(100)) and max(n_successors.values()) <= N_SUCCESSORS
    # the bigram table's entropy is what a model can reach: below 3 bits, far below the unigrams'
    unigrams = Counter(tokens[inside - 1].tolist())
    entropy = -sum(n * math.log2(n / unigrams[first]) for (first, _), n in bigrams.items()) / len(inside)
    assert 2.5 < entropy <= 3.0


def test_synthetic_takes_its_seed_from_the_path() -> None:
    assert synthetic_store(50, "").fingerprint == synthetic_store(50, "0").fingerprint
    assert synthetic_store(50, "3").fingerprint != synthetic_store(50, "0").fingerprint
    with pytest.raises(DataError, match="a whole number or empty, not 'corpus'"):
        synthetic_store(50, "corpus")
    with pytest.raises(DataError, match="needs at least 2"):
        synthetic_store(1, "")


def test_synthetic_batches_are_golden(data: DataConfig) -> None:
    loader = build_train_loader(
        data, dataset="synthetic", dataset_path="", seq_len=16, local_batch_size=2, dp_rank=0, dp_size=1,
        vocab_size=512,
    )  # fmt: skip
    first, second = itertools.islice(loader, 2)
    assert first.tokens[0].tolist() == GOLDEN_BATCH
    assert not torch.equal(first.tokens, second.tokens)
    assert first.tokens.max() < 512


def test_python_docs_are_real_text_in_a_fixed_order() -> None:
    texts = list(PythonDocs().documents())
    assert texts[:100] == list(itertools.islice(PythonDocs().documents(), 100))
    assert len(texts) > 300 and sum(map(len, texts)) > 1_000_000
    assert any('The "for" statement is used to iterate' in text for text in texts)  # a topic
    (module,) = (text for text in texts if text.startswith("textwrap\n\nText wrapping and filling."))
    assert "dedent\nRemove any common leading whitespace" in module
    assert not any(text.startswith(("idlelib", "test.", "site-packages")) for text in texts)


def test_hugging_face_without_streaming_equals_the_files(
    data: DataConfig, edu_folder: tuple[Path, list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder, shards = edu_folder
    tokenizer = build_tokenizer(data)
    by_hf = open_store(data, "huggingface", f"{folder}/*.parquet", tokenizer, 300)
    by_files = open_store(data, "files", str(folder), tokenizer, 300)
    assert by_hf.tokens.tolist() == byte_tokens(list(itertools.chain(*shards)))
    assert by_hf.fingerprint == by_files.fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_names_the_bad_file(
    data: DataConfig, tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    path = tmp_path / "a.parquet"
    write_edu_parquet(path, list(make_texts(30, seed=1)))
    data.text_column = "content"
    with pytest.raises(DataError, match=r"a\.parquet: there is no column 'content'.*int_score.*text"):
        HuggingFace(data, str(path), streaming=streaming)
    data.text_column = "text"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read.*truncated or corrupt"):
        HuggingFace(data, str(path), streaming=streaming)
    path.unlink()
    path.touch()
    with pytest.raises(DataError, match=r"a\.parquet"):
        HuggingFace(data, str(path), streaming=streaming)
    with pytest.raises(DataError, match="no files match"):
        HuggingFace(data, f"{tmp_path}/*.jsonl", streaming=streaming)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"of one kind.*use training.dataset = 'files'"):
        HuggingFace(data, f"{tmp_path}/a.txt", streaming=streaming)


def test_hugging_face_missing_column_of_json_lines(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    data.text_column = "content"
    with pytest.raises(DataError, match=r"corpus\.jsonl.*there is no column 'content'.*n, text"):
        HuggingFace(data, str(jsonl[0]), streaming=True)
