"""Training batches of a stream: coverage, ranks, exact resume."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import byte_tokens, decode_row, make_texts, write_edu_parquet

from lt2titan.data.config import DataConfig
from lt2titan.data.errors import DataError
from lt2titan.data.huggingface import HuggingFace
from lt2titan.data.loader import TrainLoader, build_train_loader
from lt2titan.data.packing import Batch
from lt2titan.data.streaming import DocumentReader, ReadPosition

L = 48
Edu = tuple[Path, list[list[str]]]


@pytest.fixture
def data(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, streaming=True, shuffle_buffer=16)


def stream_loader(data: DataConfig, path: object, *, rank: int = 0, ranks: int = 1, **kw: Any) -> TrainLoader:
    arguments = {"seq_len": L, "local_batch_size": 2, "vocab_size": 300} | kw
    return build_train_loader(
        data, dataset="huggingface", dataset_path=str(path), dp_rank=rank, dp_size=ranks, **arguments
    )


def take(loader: TrainLoader, n: int) -> list[Batch]:
    return list(itertools.islice(loader, n))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True) if x is not None
    )


def token_row(batches: list[Batch]) -> list[int]:
    """The row of tokens that consecutive windows were cut from (each begins with the last target before it)."""
    windows = [
        window for batch in batches for window in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    ]
    for (_, before), (after, _) in itertools.pairwise(windows):
        assert after[0] == before[-1]
    return [windows[0][0][0], *(target for _, targets in windows for target in targets)]


def read_texts(loader: TrainLoader, n_documents: int) -> list[str]:
    """The first ``n_documents`` texts, one after the other."""
    batches: list[Batch] = []
    n_ends = 0
    for batch in loader:
        batches.append(batch)
        n_ends += int((batch.targets == 257).sum())
        if n_ends >= n_documents:
            break
    return decode_row(token_row(batches))[:n_documents]


def test_without_shuffle_it_is_the_naive_concatenation_epoch_after_epoch(data: DataConfig, edu_folder: Edu) -> None:
    folder, shards = edu_folder
    data.shuffle = False
    naive = byte_tokens(list(itertools.chain(*shards))) * 2
    n = (len(naive) - 1) // (2 * L)
    row = token_row(take(stream_loader(data, folder), n))
    assert row == naive[: n * 2 * L + 1]


def test_an_epoch_is_a_permutation_of_all_documents(data: DataConfig, edu_folder: Edu) -> None:
    folder, shards = edu_folder
    everything = sorted(itertools.chain(*shards))
    n = len(everything)
    texts = read_texts(stream_loader(data, folder), 2 * n)
    assert sorted(texts[:n]) == sorted(texts[n:]) == everything
    assert texts[:n] != texts[n:]
    blocks = [texts[i : i + 16] for i in range(0, n - 16, 16)]
    assert all(block != sorted(block, key=everything.index) for block in blocks)  # shuffled inside
    assert texts != read_texts(stream_loader(dataclasses.replace(data, seed=1), folder), 2 * n)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_ranks_share_each_epoch_without_overlap(data: DataConfig, edu_folder: Edu, ranks: int) -> None:
    """Three shards: fewer than the ranks, as many, and a number that does not divide them."""
    folder, shards = edu_folder
    stream = HuggingFace(data, str(folder), streaming=True)
    epochs: list[list[str]] = [[], [], []]
    for rank in range(ranks):
        reader = DocumentReader(stream, dp_rank=rank, dp_size=ranks, seed=0, shuffle=True, held_out=frozenset())
        texts = (text for text, _ in reader.read(ReadPosition()))
        for epoch in epochs:
            mine = list(itertools.takewhile(lambda text: text is not None, texts))
            assert mine
            epoch += mine
    for epoch in epochs:
        assert Counter(epoch) == Counter(itertools.chain(*shards))


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_once_and_twice_equals_straight(
    data: DataConfig, edu_folder: Edu, n_workers: int, shuffle: bool
) -> None:
    """Over two epochs, with stops everywhere: in a block, at its end, at the end of an epoch."""
    folder, _ = edu_folder
    data.shuffle, data.num_workers, data.document_mask = shuffle, n_workers, True
    straight = take(stream_loader(data, folder, rank=1, ranks=2), 200)
    for stops in ([100], [1, 2, 3], [37, 111], list(range(10, 200, 10))):
        resumed: list[Batch] = []
        state: dict[str, Any] | None = None
        for begin, end in itertools.pairwise([0, *stops, 200]):
            loader = stream_loader(data, folder, rank=1, ranks=2)
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
            resumed += take(loader, end - begin)
            state = loader.state_dict()
            assert loader.position == end * 4
        assert same(straight, resumed)
    assert straight[-1].cu_seqlens is not None


def test_each_stop_of_a_short_stream_resumes(data: DataConfig, tmp_path: Path) -> None:
    """Every window of three epochs: documents shorter and longer than a window, blocks of 3."""
    folder = tmp_path / "short"
    folder.mkdir()
    for i in range(2):
        write_edu_parquet(folder / f"{i}.parquet", [*make_texts(3, seed=i, longest=1), *make_texts(2, seed=i + 9)])
    data.shuffle_buffer = 3
    one_by_one = {"local_batch_size": 1, "seq_len": 11}
    loader = stream_loader(data, folder, **one_by_one)
    straight, states = [], []
    for batch in itertools.islice(loader, 240):
        straight.append(batch)
        states.append(loader.state_dict())
    assert states[-1]["progress"]["epoch"] >= 2
    again = stream_loader(data, folder, **one_by_one)
    for i, state in enumerate(states[:-2]):
        again.load_state_dict(state)
        assert same(take(again, 2), straight[i + 1 : i + 3])


@pytest.mark.parametrize(
    ("change", "arguments", "name"),
    [
        ({}, {"rank": 0, "ranks": 1}, "data-parallel degree was 2 and is 1"),
        ({}, {"rank": 1, "ranks": 2}, "data-parallel rank was 0 and is 1"),
        ({"seed": 1}, {}, r"data\.seed"),
        ({"shuffle_buffer": 8}, {}, r"data\.shuffle_buffer was 16 and is 8"),
        ({"tokenizer": "bpe"}, {"vocab_size": 400}, "tokenizer"),
        ({"streaming": False}, {}, "kind was 'streaming' and is 'indexed'"),
        ({}, {"seq_len": 64}, r"training\.seq_len"),
    ],
)
def test_other_states_are_refused(
    data: DataConfig, edu_folder: Edu, bpe_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    change: dict[str, Any], arguments: dict[str, Any], name: str,
) -> None:  # fmt: skip
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    if "tokenizer" in change:
        change = {"tokenizer": str(bpe_folder)}
    state = stream_loader(data, edu_folder[0], rank=0, ranks=2).state_dict()
    other = stream_loader(dataclasses.replace(data, **change), edu_folder[0], **({"rank": 0, "ranks": 2} | arguments))
    with pytest.raises(DataError, match=name):
        other.load_state_dict(state)


def test_held_out_documents_are_never_trained_on(data: DataConfig, edu_folder: Edu) -> None:
    folder, shards = edu_folder
    data.holdout_documents = 45  # all of the first shard and 5 of the next
    everything = list(itertools.chain(*shards))
    texts = read_texts(stream_loader(data, folder), len(everything) - 45)
    assert sorted(texts) == sorted(everything[45:])


def test_malformed_rows_are_skipped_up_to_the_limit(data: DataConfig, tmp_path: Path) -> None:
    good = make_texts(20, seed=1)
    path = tmp_path / "a.parquet"
    write_edu_parquet(path, [None, *good[:10], None, *good[10:]])
    data.shuffle, data.max_bad_rows = False, 2
    assert read_texts(stream_loader(data, path), 60) == 3 * good  # a row counts once, however often it is read
    data.max_bad_rows = 1
    with pytest.raises(DataError, match=r"a\.parquet, row 12: the text is missing"):
        read_texts(stream_loader(data, path), 20)


def test_a_rank_without_documents_is_an_error(data: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_edu_parquet(path, ["one", "two"])
    with pytest.raises(DataError, match="rank 3 finds no document"):
        next(iter(stream_loader(data, path, rank=3, ranks=4)))


def test_json_lines_stream(data: DataConfig, jsonl: tuple[Path, list[str]]) -> None:
    path, texts = jsonl
    data.shuffle = False
    assert read_texts(stream_loader(data, path), len(texts)) == texts
    path.write_text(path.read_text() + '{"text": "trunc')
    with pytest.raises(DataError, match=r"corpus\.jsonl"):
        read_texts(stream_loader(data, path), len(texts) + 1)
