"""Training batches of a stream: coverage, ranks, exact resume."""

from __future__ import annotations

import dataclasses
import gzip
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
from lt2titan.data.loader import TrainLoader, build_loaders
from lt2titan.data.packing import Batch
from lt2titan.data.sources import open_stream
from lt2titan.data.streaming import DocumentReader, ReadPosition

L = 48
Edu = tuple[Path, list[list[str]]]


@pytest.fixture
def data(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, streaming=True, shuffle_buffer=16)


def stream_loader(data: DataConfig, path: object, *, rank: int = 0, ranks: int = 1, **kw: Any) -> TrainLoader:
    arguments = {"seq_len": L, "local_batch_size": 2, "vocab_size": 300, "validation": None} | kw
    return build_loaders(data, dataset="huggingface", dataset_path=str(path), dp_rank=rank, dp_size=ranks, **arguments)[
        0
    ]


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
    stream = open_stream(data, str(folder))
    epochs: list[list[str]] = [[], [], []]
    for rank in range(ranks):
        reader = DocumentReader(
            stream, dp_rank=rank, dp_size=ranks, seed=0, shuffle=True, held_out=frozenset(), max_bad_rows=0
        )
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
            assert state["progress"]["position"] == end * 4
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
    if "tokenizer" in change:
        change = {"tokenizer": str(bpe_folder)}
    state = stream_loader(data, edu_folder[0], rank=0, ranks=2).state_dict()
    other = stream_loader(dataclasses.replace(data, **change), edu_folder[0], **({"rank": 0, "ranks": 2} | arguments))
    with pytest.raises(DataError, match=name):
        other.load_state_dict(state)


def test_held_out_documents_are_never_trained_on(data: DataConfig, edu_folder: Edu) -> None:
    folder, shards = edu_folder
    data.holdout_documents = 14
    everything = list(itertools.chain(*shards))
    texts = read_texts(stream_loader(data, folder), len(everything) - 14)
    assert sorted(texts) == sorted(everything[14:])


@pytest.mark.parametrize(("n_documents", "n_held_out"), [(1, 0), (2, 1), (45, 4), (142, 14)])
def test_a_tenth_of_a_short_stream_is_held_out(
    data: DataConfig, tmp_path: Path, n_documents: int, n_held_out: int
) -> None:
    path = tmp_path / "a.parquet"
    everything = make_texts(n_documents, seed=1)
    write_edu_parquet(path, list(everything))
    data.holdout_documents = 100
    texts = read_texts(stream_loader(data, path, seq_len=4), n_documents - n_held_out)
    assert sorted(texts) == sorted(everything[n_held_out:])


def test_malformed_rows_are_skipped_up_to_the_limit(data: DataConfig, tmp_path: Path) -> None:
    """They are counted anew in each epoch, and apart from those met while looking for documents to hold out."""
    good = make_texts(20, seed=1)
    path = tmp_path / "a.parquet"
    write_edu_parquet(path, [None, *good[:10], None, *good[10:]])
    data.shuffle, data.max_bad_rows, data.holdout_documents = False, 2, 2
    assert read_texts(stream_loader(data, path), 18 * 3) == good[2:] * 3
    data.max_bad_rows, data.holdout_documents = 1, 0
    with pytest.raises(DataError, match=r"a\.parquet, row 12: the text is missing.*row number 2"):
        read_texts(stream_loader(data, path), 20)


def test_each_rank_counts_the_malformed_rows_of_its_share(data: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    good = make_texts(20, seed=1)
    write_edu_parquet(path, [text for text in good for _ in range(2)] + [None] * 6)  # 3 for each of two ranks
    data.max_bad_rows = 3
    for rank in range(2):
        assert sorted(read_texts(stream_loader(data, path, rank=rank, ranks=2), 20)) == sorted(good)
    data.max_bad_rows = 2
    for rank, last in ((0, 45), (1, 46)):
        with pytest.raises(DataError, match=rf"row {last}: .*row number 3"):
            read_texts(stream_loader(data, path, rank=rank, ranks=2), 25)


def test_malformed_rows_before_a_resume_count(
    data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At every stop: a resumed run gives up at the same row as a straight one."""
    path = tmp_path / "a.parquet"
    good = make_texts(40, seed=1)
    rows = [row for i, text in enumerate(good) for row in ([None] * (i % 4 == 3) + [text])]
    write_edu_parquet(path, rows)  # 10 of them are malformed
    data.shuffle_buffer, data.max_bad_rows = 3, 7
    failing = next(n for n in range(1, 100) if sum(row is None for row in rows[:n]) == 8)
    stops = 0
    state: dict[str, Any] | None = None
    with pytest.raises(DataError, match=rf"row {failing}: .*row number 8"):
        for _ in range(1000):
            loader = stream_loader(data, path)
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
            take(loader, 1)
            state = loader.state_dict()
            stops += 1
    assert stops > 10
    data.max_bad_rows = 10
    take(stream_loader(data, path), 200)  # several epochs


def test_a_rank_without_documents_is_an_error(data: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_edu_parquet(path, ["one", "two"])
    with pytest.raises(DataError, match="rank 3 finds no document"):
        next(iter(stream_loader(data, path, rank=3, ranks=4)))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_json_lines_stream(data: DataConfig, tmp_path: Path, suffix: str) -> None:
    """With a malformed line that is skipped, and resumed after it."""
    texts = make_texts(40, seed=3)
    lines = [json.dumps({"text": text}) for text in texts]
    content = "\n".join([*lines[:9], '{"text": "trunc', "", *lines[9:]]).encode()
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    data.shuffle, data.max_bad_rows, data.shuffle_buffer = False, 1, 4
    assert read_texts(stream_loader(data, path), 80) == texts * 2
    straight = take(stream_loader(data, path), 30)
    loader = stream_loader(data, path)
    take(loader, 20)
    again = stream_loader(data, path)
    again.load_state_dict(loader.state_dict())
    assert same(take(again, 10), straight[20:])
    data.max_bad_rows = 0
    with pytest.raises(DataError, match=r"corpus\.jsonl.*, line 10: not valid JSON.*data\.max_bad_rows = 0"):
        read_texts(stream_loader(data, path), 20)


def test_a_bad_shard_is_named(data: DataConfig, edu_folder: Edu) -> None:
    """At the start where the file's footer tells, while reading where only its pages do."""
    folder, _ = edu_folder
    path = folder / "train-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes(1000) + content[1040:])
    data.shuffle = False
    loader = stream_loader(data, folder)
    with pytest.raises(DataError, match=r"train-00001\.parquet: cannot be read.*truncated or corrupt") as caught:
        read_texts(loader, 140)
    assert "hub" not in str(caught.value)
    path.write_bytes(content[:500])
    with pytest.raises(DataError, match=r"train-00001\.parquet: cannot be read.*truncated or corrupt"):
        stream_loader(data, folder)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00001\.parquet: the file is empty"):
        stream_loader(data, folder)
    path.write_bytes(content)
    data.text_column = "content"
    with pytest.raises(DataError, match=r"\.parquet: there is no column 'content'.*int_score.*text"):
        stream_loader(data, folder)
