from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import byte_tokens, decode_row

from lt2titan.data.config import DataConfig
from lt2titan.data.errors import DataError
from lt2titan.data.loader import ValidationLoader, build_train_loader, build_validation_loader
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


def test_training_and_validation_share_no_document(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    path, texts = jsonl
    data.holdout_documents = 9

    def held_out(data: DataConfig) -> list[str]:
        row = [256, *(target for _, target in pairs(list(validation_loader(data, path))))]
        return decode_row(row)

    validation = held_out(data)
    assert len(validation) == 9
    assert held_out(dataclasses.replace(data, seed=1)) == validation
    train = build_train_loader(
        data, dataset="files", dataset_path=str(path), seq_len=byte_length(texts) - byte_length(validation) - 1,
        local_batch_size=1, dp_rank=0, dp_size=1, vocab_size=300,
    )  # fmt: skip
    batch = next(iter(train))  # a window as long as all training documents together
    row = [*batch.tokens[0].tolist(), int(batch.targets[0, -1])]
    assert Counter(decode_row(row)) + Counter(validation) == Counter(texts)


def byte_length(texts: list[str]) -> int:
    return len(byte_tokens(texts))


def test_a_stream_holds_out_its_first_documents(data: DataConfig, edu_folder: tuple[Path, list[list[str]]]) -> None:
    folder, shards = edu_folder
    data.streaming, data.holdout_documents = True, 45
    batches = list(validation_loader(data, folder, dataset="huggingface"))
    row = [256, *(target for _, target in pairs(batches))]
    assert decode_row(row) == list(itertools.chain(*shards))[:45]


def test_nothing_to_validate_on_is_an_error(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    with pytest.raises(DataError, match=r"data\.holdout_documents = 0.*set validation\.dataset"):
        validation_loader(data, jsonl[0])
