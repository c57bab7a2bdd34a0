from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import byte_tokens, decode_row

from lt2titan.data.config import DataConfig
from lt2titan.data.errors import DataError
from lt2titan.data.loader import TrainLoader, ValidationLoader, ValidationText, build_loaders, build_validation_loader
from lt2titan.data.packing import Batch

L = 40


def validation_loader(data: DataConfig, path: object, *, rank: int = 0, ranks: int = 1, **kw: Any) -> ValidationLoader:
    arguments = {"dataset": "files", "seq_len": L, "local_batch_size": 2, "vocab_size": 300, "steps": -1} | kw
    return build_validation_loader(data, dataset_path=str(path), dp_rank=rank, dp_size=ranks, **arguments)


def pairs(batches: list[Batch]) -> list[tuple[int, int]]:
    """(token, target) of all that is predicted, in order."""
    found = [
        pair
        for batch in batches
        for pair in zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True)
    ]
    return [pair for pair in found if pair[1] != -100]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("b", [1, 2, 5])
def test_every_target_once_over_all_ranks(data: DataConfig, jsonl: tuple[Path, list[str]], ranks: int, b: int) -> None:
    path, texts = jsonl
    naive = byte_tokens(texts)
    loaders = [
        validation_loader(data, path, rank=r, ranks=ranks, local_batch_size=b, holdout=False) for r in range(ranks)
    ]
    batches = [list(loader) for loader in loaders]
    assert {len(found) for found in batches} == {loaders[0].n_batches}
    in_order = [batch for step in zip(*batches, strict=True) for batch in step]
    assert pairs(in_order) == list(itertools.pairwise(naive))
    n_bytes = sum(batch.n_bytes.item() for batch in in_order)
    assert n_bytes == pytest.approx(sum(len(text.encode()) for text in texts), rel=1e-12)


def test_each_pass_is_the_same(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    loader = validation_loader(data, jsonl[0], holdout=False)
    for first, second in zip(loader, loader, strict=True):
        assert torch.equal(first.tokens, second.tokens) and torch.equal(first.targets, second.targets)


def test_document_mask_leaves_no_target_across_documents(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    path, texts = jsonl
    data.document_mask = True
    batches = list(validation_loader(data, path, holdout=False))
    expected = [pair for text in texts for pair in itertools.pairwise(byte_tokens([text]))]
    assert pairs(batches) == expected
    assert sum(batch.n_bytes.item() for batch in batches) == pytest.approx(sum(len(t.encode()) for t in texts))


def test_steps_cut_a_pass_short(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    everything = list(validation_loader(data, jsonl[0], holdout=False))
    some = validation_loader(data, jsonl[0], holdout=False, steps=3)
    assert len(some) == 3
    assert pairs(list(some)) == pairs(everything[:3])
    assert len(validation_loader(data, jsonl[0], holdout=False, steps=10**6)) == len(everything)


def loaders(
    data: DataConfig, path: object, validation: ValidationText | None, **kw: Any
) -> tuple[TrainLoader, ValidationLoader | None]:
    arguments = {"dataset": "files", "seq_len": L, "local_batch_size": 1, "vocab_size": 300} | kw
    return build_loaders(data, dataset_path=str(path), dp_rank=0, dp_size=1, validation=validation, **arguments)


def own(dataset: str = "", dataset_path: str = "", **kw: Any) -> ValidationText:
    return ValidationText(dataset=dataset, dataset_path=dataset_path, seq_len=L, local_batch_size=2, **kw)


def validation_texts(loader: ValidationLoader | None) -> list[str]:
    assert loader is not None
    return decode_row([256, *(target for _, target in pairs(list(loader)))])


def trained_texts(loader: TrainLoader) -> list[str]:
    """Of a loader whose windows are as long as all training documents together."""
    batch = next(iter(loader))
    return decode_row([*batch.tokens[0].tolist(), int(batch.targets[0, -1])])


def test_training_and_validation_share_no_document(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    """Also where the text of training is spelled out, differently."""
    path, texts = jsonl
    data.holdout_documents = 9
    held_out = validation_texts(validation_loader(data, path))
    assert len(held_out) == 9
    assert validation_texts(validation_loader(dataclasses.replace(data, seed=1), path)) == held_out
    seq_len = byte_length(texts) - byte_length(held_out) - 1
    spellings = (own(), own("files"), own("files", str(path)), own("files", f"{path.parent}/corp*.jsonl"))
    for validation in (*spellings, own(enable=False), None):
        train, loader = loaders(data, path, validation, seq_len=seq_len)
        assert Counter(trained_texts(train)) + Counter(held_out) == Counter(texts)
        if validation is None or not validation.enable:
            assert loader is None
        else:
            assert validation_texts(loader) == held_out


def test_validation_may_have_a_text_of_its_own(data: DataConfig, jsonl: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, texts = jsonl
    data.holdout_documents = 9
    other = tmp_path / "other.txt"
    other.write_text("another text")
    for enable in (True, False):
        validation = own("files", str(other), enable=enable)
        train, loader = loaders(data, path, validation, seq_len=byte_length(texts) - 1)
        assert sorted(trained_texts(train)) == sorted(texts)
        if enable:
            assert validation_texts(loader) == ["another text"]
    _, loader = loaders(data, path, own("synthetic"))
    assert loader is not None and len(loader) > 1000


def test_a_file_that_is_trained_and_validated_on_is_reported(
    data: DataConfig, jsonl: tuple[Path, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = jsonl
    (path.parent / "other.txt").write_text("another text")
    loaders(data, path, own("files", str(path.parent / "other.txt")))
    assert "trained and validated on" not in caplog.text
    loaders(data, path, own("files", str(path.parent)))
    assert f"1 files are trained and validated on, such as {path}" in caplog.text


def test_validation_being_on_does_not_change_the_order(
    data: DataConfig, jsonl: tuple[Path, list[str]], edu_folder: tuple[Path, list[list[str]]]
) -> None:
    data.holdout_documents = 9
    streaming = dataclasses.replace(data, streaming=True)
    for settings, dataset, path in ((data, "files", jsonl[0]), (streaming, "huggingface", edu_folder[0])):
        states, firsts = [], []
        for validation in (None, own(), own(enable=False)):
            train, _ = loaders(settings, path, validation, dataset=dataset)
            firsts.append(next(iter(train)).tokens)
            states.append(train.state_dict())
        assert states[0] == states[1] == states[2]
        assert torch.equal(firsts[0], firsts[1]) and torch.equal(firsts[0], firsts[2])


def test_each_source_is_opened_once(
    data: DataConfig, jsonl: tuple[Path, list[str]], bpe_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data.holdout_documents, data.tokenizer = 9, str(bpe_folder)
    for validation in (own(), own("python_docs")):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lt2titan"):
            loaders(data, jsonl[0], validation, vocab_size=500)
        assert sum("tokenizer: data.bos_token" in message for message in caplog.messages) == 1
        assert sum("the tokenizer has 400 tokens" in message for message in caplog.messages) == 1
        assert sum("corpus.jsonl (" in m and "120 documents" in m for m in caplog.messages) == 1


def test_a_single_document_cannot_be_split(data: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one text " * 100)
    data.holdout_documents = 64
    train, loader = loaders(data, path, None)
    assert loader is None and next(iter(train)).tokens.shape == (1, L)
    loaders(data, path, own(enable=False))
    with pytest.raises(DataError, match=r"a single document.*set validation\.dataset.*or validation\.no_enable"):
        loaders(data, path, own())
    (tmp_path / "b.txt").write_text("another text " * 100)
    _, loader = loaders(data, tmp_path, own())
    assert len(validation_texts(loader)) == 1


def byte_length(texts: list[str]) -> int:
    return len(byte_tokens(texts))


def test_a_stream_holds_out_its_first_documents(data: DataConfig, edu_folder: tuple[Path, list[list[str]]]) -> None:
    folder, shards = edu_folder
    texts = list(itertools.chain(*shards))
    data.streaming, data.holdout_documents = True, 11
    assert validation_texts(validation_loader(data, folder, dataset="huggingface")) == texts[:11]
    assert validation_texts(loaders(data, folder, own(), dataset="huggingface")[1]) == texts[:11]
    data.holdout_documents = 100
    assert validation_texts(loaders(data, folder, own(), dataset="huggingface")[1]) == texts[:14]  # a tenth


def test_a_stream_may_validate_on_files_and_on_another_stream(
    data: DataConfig, edu_folder: tuple[Path, list[list[str]]], jsonl: tuple[Path, list[str]]
) -> None:
    folder, _ = edu_folder
    path, texts = jsonl
    data.streaming, data.holdout_documents = True, 7
    for dataset, expected in (("files", texts), ("huggingface", texts[:7])):
        _, loader = loaders(data, folder, own(dataset, str(path)), dataset="huggingface")
        assert validation_texts(loader) == expected
        evaluated = validation_loader(data, path, dataset=dataset, holdout=False)
        assert validation_texts(evaluated) == expected


def test_nothing_to_validate_on_is_an_error(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    with pytest.raises(DataError, match=r"data\.holdout_documents = 0.*set validation\.dataset"):
        validation_loader(data, jsonl[0])
    with pytest.raises(DataError, match=r"data\.holdout_documents = 0.*set validation\.dataset"):
        loaders(data, jsonl[0], own())
    loaders(data, jsonl[0], None)
