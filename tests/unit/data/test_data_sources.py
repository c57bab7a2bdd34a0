from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import byte_tokens, write_edu_parquet

from lt2titan.data.config import DataConfig
from lt2titan.data.errors import DataError
from lt2titan.data.huggingface import HuggingFace
from lt2titan.data.loader import build_loaders
from lt2titan.data.python_docs import PythonDocs
from lt2titan.data.shuffle import permutation, random_words
from lt2titan.data.sources import TEXT_SOURCES, open_store, open_stream, synthetic_store
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
    loader, _ = build_loaders(
        data, dataset="synthetic", dataset_path="", seq_len=16, local_batch_size=2, dp_rank=0, dp_size=1,
        vocab_size=512, validation=None,
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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ``datasets`` writes goes to a folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # or it would wait for the network


@pytest.mark.usefixtures("hub")
def test_hugging_face_equals_the_files(data: DataConfig, edu_folder: tuple[Path, list[list[str]]]) -> None:
    """By the ``datasets`` library, which takes a folder for a dataset as it takes a name of the hub."""
    folder, shards = edu_folder
    write_edu_parquet(folder / "train-00001.parquet", [None, *shards[1], None])
    tokenizer = build_tokenizer(data)
    data.max_bad_rows = 2
    texts = list(itertools.chain(*shards))
    by_library = HuggingFace(data, str(folder), streaming=False)
    assert list(by_library.documents()) == texts and by_library.bad_rows.count == 2
    by_name = open_store(data, "huggingface", f"{folder}/*.parquet", tokenizer, 300)
    by_files = open_store(data, "files", str(folder), tokenizer, 300)
    assert by_name.tokens.tolist() == by_files.tokens.tolist() == byte_tokens(texts)

    by_library, by_files = HuggingFace(data, str(folder), streaming=True), open_stream(data, str(folder))
    assert by_library.n_shards == by_files.n_shards == 3
    for shard, first_row in ((0, 0), (1, 0), (1, 3), (2, 47), (2, 100)):
        rows = [
            [(n, text if isinstance(text, str) else text.reason) for n, text in stream.shard_rows(shard, first_row)]
            for stream in (by_library, by_files)
        ]
        assert rows[0] == rows[1]
    data.text_column = "content"
    with pytest.raises(DataError, match=r"there is no column 'content'.*int_score.*text"):
        HuggingFace(data, str(folder), streaming=True)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("streaming", [False, True])
def test_the_reason_of_the_library_is_told(data: DataConfig, tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "trunc')
    with pytest.raises(DataError, match=r"(JSON parse error|ArrowInvalid|JSONDecodeError)"):
        for _ in HuggingFace(data, str(folder), streaming=streaming).shard_rows(0, 0):
            pass


def test_local_files_of_hugging_face_are_read_as_files(data: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "trunc\n{"text": "two"}\n')
    data.max_bad_rows = 1
    store = open_store(data, "huggingface", str(path), build_tokenizer(data), 300)
    assert store.tokens.tolist() == byte_tokens(["one", "two"])
    for open_it in (open_stream, TEXT_SOURCES["huggingface"]):
        with pytest.raises(DataError, match="no files match"):
            open_it(data, f"{tmp_path}/*.parquet")
    (tmp_path / "README.md").write_text("a downloaded dataset's card is no document")
    with pytest.raises(DataError, match=r"of one kind.*use training.dataset = 'files'"):
        open_stream(data, str(tmp_path))
