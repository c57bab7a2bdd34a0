"""Training batches of indexed datasets: packing, order, ranks, resume."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import byte_tokens, decode_row

from lt2titan.data.config import DataConfig
from lt2titan.data.errors import DataError
from lt2titan.data.indexed import Epochs, split_documents
from lt2titan.data.loader import TrainLoader, build_loaders
from lt2titan.data.packing import Batch
from lt2titan.data.store import store_in_memory
from lt2titan.data.tokenizer import build_tokenizer

L = 32


def train_loader(
    data: DataConfig, path: object, *, rank: int = 0, ranks: int = 1, b: int = 2, **kw: Any
) -> TrainLoader:
    arguments = {"dataset": "files", "seq_len": L, "vocab_size": 300, "validation": None} | kw
    return build_loaders(data, dataset_path=str(path), local_batch_size=b, dp_rank=rank, dp_size=ranks, **arguments)[0]


def take(loader: TrainLoader, n: int) -> list[Batch]:
    return list(itertools.islice(loader, n))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True) if x is not None
    )


def rows(batches: list[Batch]) -> list[tuple[int, ...]]:
    """Each sample as its L + 1 tokens."""
    return [
        (*tokens, target[-1])
        for batch in batches
        for tokens, target in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    ]


def test_without_shuffle_it_is_the_naive_concatenation(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    path, texts = jsonl
    data.shuffle = False
    naive = byte_tokens(texts)
    n = (len(naive) - 1) // L
    batches = take(train_loader(data, path, b=1), n)
    assert torch.cat([b.tokens[0] for b in batches]).tolist() == naive[: n * L]
    assert torch.cat([b.targets[0] for b in batches]).tolist() == naive[1 : n * L + 1]


def test_an_epoch_is_a_permutation_of_whole_documents_cut_into_windows() -> None:
    """On tokens that are all different, so that the windows can be chained back into the row they were cut from."""
    lengths = np.random.default_rng(0).integers(1, 90, size=50)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    n_tokens = int(offsets[-1])
    store = store_in_memory(np.arange(n_tokens, dtype=np.uint32), offsets, lengths)
    used = np.arange(3, 50)
    epochs = Epochs(store, used, seq_len=L, seed=1, shuffle=True)
    n_used = n_tokens - int(offsets[3])
    assert epochs.n_windows == (n_used - 1) // L
    orders = []
    for epoch in range(3):
        samples = [epochs.sample(epoch * epochs.n_windows + i) for i in range(epochs.n_windows)]
        windows = [np.concatenate([piece.ids for piece in sample]).tolist() for sample in samples]
        assert {len(window) for window in windows} == {L + 1}
        targets = Counter(token for window in windows for token in window[1:])
        assert max(targets.values()) == 1 and len(targets) == epochs.n_windows * L
        by_first = {window[0]: window for window in windows}
        (first,) = set(by_first) - {window[-1] for window in windows}
        row = [first]
        while row[-1] in by_first:
            row += by_first[row[-1]][1:]
        assert len(row) == epochs.n_windows * L + 1
        documents = [np.searchsorted(offsets, token, "right") - 1 for token in row if token in offsets]
        whole = [token for d in documents for token in range(offsets[d], offsets[d + 1])]
        assert row == whole[: len(row)]
        assert set(documents) <= set(used.tolist()) and len(set(documents)) == len(documents)
        assert windows != [row[i * L : i * L + L + 1] for i in range(len(windows))]  # windows are shuffled too
        for sample in samples:
            assert [p.is_start for p in sample] == [p.ids[0] in offsets for p in sample]
        orders.append(documents)
    assert orders[0] != orders[1] != orders[2]


def test_whole_documents_come_back_as_text(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    path, texts = jsonl
    loader = train_loader(data, path, b=1, seq_len=2000)
    batches = take(loader, 2)
    found = [text for row in rows(batches) for text in decode_row(list(row))]
    assert len(found) > 10 and set(found) <= set(texts)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_step_is_the_same_at_any_data_parallel_degree(
    data: DataConfig, jsonl: tuple[Path, list[str]], n_workers: int
) -> None:
    """12 samples a step: by 1, 2, 3 or 6 ranks, with and without accumulation, over more than an epoch."""
    path, texts = jsonl
    data.num_workers = n_workers
    n_steps = 60
    reference = [rows(take_one) for take_one in chunks(take(train_loader(data, path, b=12), n_steps), 1)]
    assert sum(map(len, reference)) > n_windows(texts) * 1.2
    for ranks, b in ((1, 4), (2, 6), (2, 3), (3, 4), (6, 1)):
        n_accumulation = 12 // (ranks * b)
        steps = [
            chunks(take(train_loader(data, path, rank=r, ranks=ranks, b=b), n_steps * n_accumulation), n_accumulation)
            for r in range(ranks)
        ]
        for step, expected in enumerate(reference):
            assert sorted(row for rank in steps for row in rows(rank[step])) == sorted(expected)


def n_windows(texts: list[str], seq_len: int = L) -> int:
    return (len(byte_tokens(texts)) - 1) // seq_len


def chunks(batches: list[Batch], n: int) -> list[list[Batch]]:
    return [batches[i : i + n] for i in range(0, len(batches), n)]


def test_ranks_are_disjoint(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    path, texts = jsonl
    n = n_windows(texts) // 6
    seen = [row for r in range(3) for row in rows(take(train_loader(data, path, rank=r, ranks=3, b=2), n))]
    assert len(set(seen)) == len(seen) == 6 * n


def test_the_seed_decides_the_order(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    path, _ = jsonl
    first = take(train_loader(data, path), 5)
    assert same(first, take(train_loader(data, path), 5))
    assert not same(first, take(train_loader(dataclasses.replace(data, seed=43), path), 5))


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("document_mask", [False, True])
def test_resume_once_and_twice_equals_straight(
    data: DataConfig, jsonl: tuple[Path, list[str]], n_workers: int, document_mask: bool
) -> None:
    path, _ = jsonl
    data.num_workers, data.document_mask = n_workers, document_mask
    straight = take(train_loader(data, path), 90)
    resumed: list[Batch] = []
    state = None
    for n in (7, 50, 33):
        loader = train_loader(data, path)
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        resumed += take(loader, n)
        state = loader.state_dict()
    assert same(straight, resumed)
    assert state is not None and state["progress"] == {"position": 180}


def test_resume_with_another_number_of_ranks_and_workers(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    path, _ = jsonl
    straight = rows(take(train_loader(data, path, b=6), 8))
    data.num_workers = 2
    pair = [train_loader(data, path, rank=r, ranks=2, b=3) for r in range(2)]
    first = [row for loader in pair for row in rows(take(loader, 3))]
    assert pair[0].state_dict() == pair[1].state_dict()
    alone = train_loader(data, path, b=2)
    alone.load_state_dict(pair[1].state_dict())
    assert alone.state_dict()["progress"] == {"position": 18}
    assert sorted(first) == sorted(straight[:18])
    assert rows(take(alone, 15)) == straight[18:]


def test_what_was_only_prepared_does_not_count(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    path, _ = jsonl
    data.num_workers, data.prefetch_factor = 2, 4
    loader = train_loader(data, path)
    iterator = iter(loader)
    for n in range(1, 6):
        next(iterator)
        assert loader.state_dict()["progress"] == {"position": 2 * n}


def test_a_moved_dataset_resumes_and_a_changed_one_is_refused(
    data: DataConfig, jsonl: tuple[Path, list[str]], tmp_path: Path
) -> None:
    path, _ = jsonl
    state = train_loader(data, path).state_dict()
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(path, moved)
    os.utime(moved, (1, 1))
    train_loader(data, moved).load_state_dict(state)
    moved.write_text(path.read_text().replace("fox", "cat"))
    with pytest.raises(DataError, match="does not fit this run: dataset and tokenizer"):
        train_loader(data, moved).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 7}, r"data\.seed was 42 and is 7"),
        ({"shuffle": False}, r"data\.shuffle"),
        ({"holdout_documents": 5}, r"data\.holdout_documents"),
        ({"add_eos": False}, "dataset and tokenizer"),
    ],
)
def test_states_of_another_order_are_refused(
    data: DataConfig, jsonl: tuple[Path, list[str]], change: dict[str, Any], name: str
) -> None:
    path, _ = jsonl
    state = train_loader(data, path).state_dict()
    with pytest.raises(DataError, match=name):
        train_loader(dataclasses.replace(data, **change), path).load_state_dict(state)


def test_a_state_of_another_length_is_refused(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    path, _ = jsonl
    state = train_loader(data, path).state_dict()
    with pytest.raises(DataError, match=r"training\.seq_len was 32 and is 64"):
        train_loader(data, path, seq_len=64).load_state_dict(state)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_bytes_of_text_are_exact_over_whole_documents(
    data: DataConfig, jsonl: tuple[Path, list[str]], bpe_folder: Path, tokenizer: str, document_mask: bool
) -> None:
    """A sequence length of 1 cuts no tail off: an epoch holds every token but the first."""
    path, texts = jsonl
    data.document_mask, data.shuffle = document_mask, False
    data.tokenizer = tokenizer if tokenizer == "bytes" else str(bpe_folder)
    encoder = build_tokenizer(data)
    n_tokens = sum(map(len, encoder.encode_documents(texts, encoder.dtype)))
    batches = take(train_loader(data, path, b=1, seq_len=1, vocab_size=400), n_tokens - 1)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert sum(b.n_bytes.item() for b in batches) == pytest.approx(n_bytes, rel=1e-12)
    n_ignored = sum(int((b.targets == -100).sum()) for b in batches)
    assert n_ignored == (len(texts) - 1 if document_mask else 0)


def test_document_mask_follows_the_documents(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    path, _ = jsonl
    plain = take(train_loader(data, path, b=3), 40)
    data.document_mask = True
    for batch, unmasked in zip(take(train_loader(data, path, b=3), 40), plain, strict=True):
        assert torch.equal(batch.tokens, unmasked.tokens) and torch.equal(batch.n_bytes, unmasked.n_bytes)
        flat = batch.tokens.flatten().tolist()
        starts = {i for i, token in enumerate(flat) if token == 256 or i % L == 0} | {3 * L}
        assert batch.cu_seqlens is not None and batch.cu_seqlens.shape == (3 * 64 + 1,)
        assert sorted(set(batch.cu_seqlens.tolist())) == sorted(starts)
        last = 0
        for i, (position, target) in enumerate(
            zip(batch.positions.flatten().tolist(), batch.targets.flatten().tolist(), strict=True)
        ):
            last = i if i in starts else last
            assert position == i - last
            assert (target == -100) == (flat[i] == 257)
        assert torch.equal(batch.targets[batch.targets != -100], unmasked.targets[batch.targets != -100])


def test_too_little_text_is_refused(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    with pytest.raises(DataError, match="fewer than one sample of"):
        train_loader(data, jsonl[0], seq_len=1_000_000)


@pytest.mark.parametrize(
    ("n_documents", "n_held_out"), [(1000, 64), (640, 64), (639, 63), (120, 12), (19, 1), (3, 1), (2, 1), (1, 0)]
)
def test_a_tenth_of_few_documents_is_held_out(
    n_documents: int, n_held_out: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lt2titan"):
        documents, held_out = split_documents(n_documents, 64)
    assert len(held_out) == n_held_out
    assert sorted([*documents, *held_out]) == list(range(n_documents))
    expected = f"{n_documents} documents are few: {n_held_out} instead of data.holdout_documents = 64"
    assert (expected in caplog.text) == (n_held_out < 64)


def test_a_tokenizer_must_fit_the_model(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    with pytest.raises(DataError, match="258 tokens and the model only 200"):
        train_loader(data, jsonl[0], vocab_size=200)


def test_unusable_settings_are_refused(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    with pytest.raises(DataError, match="no dataset 'c4'; choose one of python_docs"):
        train_loader(data, jsonl[0], dataset="c4")
    data.streaming = True
    with pytest.raises(DataError, match=r"data\.streaming = true needs training\.dataset = 'huggingface'"):
        train_loader(data, jsonl[0])
