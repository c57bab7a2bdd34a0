"""Small corpora and a small tokenizer, made from a seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import make_texts, write_edu_parquet

from lt2titan.data.config import DataConfig


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_folder=str(tmp_path / "cache"), holdout_documents=0)


@pytest.fixture
def jsonl(tmp_path: Path) -> tuple[Path, list[str]]:
    """A JSON-lines file and its texts, in order."""
    texts = make_texts(120, seed=1)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return path, texts


@pytest.fixture
def edu_folder(tmp_path: Path) -> tuple[Path, list[list[str]]]:
    """A folder of three parquet files with FineWeb-Edu's columns, and the texts of each."""
    folder = tmp_path / "edu"
    folder.mkdir()
    shards = [make_texts(n, seed=10 + i) for i, n in enumerate((40, 55, 47))]
    for i, texts in enumerate(shards):
        write_edu_parquet(folder / f"train-{i:05d}.parquet", list(texts))
    return folder, shards


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer.json of 400 tokens, trained on the corpus, and no config beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(200, seed=0), trainer)
    tokenizer.enable_truncation(max_length=8)  # as many published files do; a pretraining corpus must not be cut
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
