from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpora import make_texts, write_edu_parquet

from lt2titan.data.errors import DataError
from lt2titan.data.files import Files
from lt2titan.data.find import find_files

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(path: object, column: str = "text", max_bad_rows: int = 0) -> list[str]:
    return list(Files(find_files(str(path)), column, max_bad_rows).documents())


def as_jsonl(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({column: text}) + "\n" for text in texts).encode()


def test_every_kind_gives_the_same_texts(tmp_path: Path) -> None:
    texts = make_texts(30, seed=2)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(texts))
    assert read(tmp_path / "a.jsonl") == texts
    write_edu_parquet(tmp_path / "a.parquet", list(texts))
    assert read(tmp_path / "a.parquet") == texts
    dictionary = pa.table({"body": pa.array(texts).dictionary_encode(), "large": pa.array(texts, pa.large_string())})
    pq.write_table(dictionary, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", "body") == texts
    assert read(tmp_path / "b.parquet", "large") == texts
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    assert read(tmp_path / "*.txt") == texts


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    texts = make_texts(300, seed=3)
    compress = COMPRESS[suffix]
    content = as_jsonl(texts)
    # two streams one after the other, as parallel compressors write them
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(content[:1000]) + compress(content[1000:]))
    assert read(tmp_path / f"a.jsonl{suffix}") == texts
    (tmp_path / f"b.txt{suffix}").write_bytes(compress(texts[0].encode()))
    assert read(tmp_path / f"b.txt{suffix}") == texts[:1]
    write_edu_parquet(tmp_path / "c.parquet", list(texts))
    (tmp_path / f"c.parquet{suffix}").write_bytes(compress((tmp_path / "c.parquet").read_bytes()))
    assert read(tmp_path / f"c.parquet{suffix}") == texts


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_truncated_compressed_file_is_an_error_naming_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](as_jsonl(make_texts(300, seed=3)))[:-20])
    with pytest.raises(DataError, match=rf"a\.jsonl{suffix}: cannot be read.*truncated or corrupt"):
        read(path)


def test_a_truncated_or_corrupt_parquet_is_an_error_naming_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_edu_parquet(path, list(make_texts(300, seed=3)))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read.*truncated or corrupt"):
        read(path)
    path.write_bytes(content[:40] + bytes(2000) + content[2040:])  # the footer is whole, the pages are not
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read.*truncated or corrupt"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_an_empty_file_is_an_error_naming_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"{name}: the file is empty"):
        read(tmp_path)


def test_a_file_without_rows_is_an_error_naming_it(tmp_path: Path) -> None:
    write_edu_parquet(tmp_path / "a.parquet", [])
    with pytest.raises(DataError, match=r"a\.parquet"):
        read(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"b\.jsonl: the file is empty"):
        read(tmp_path / "b.jsonl")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"c\.txt\.gz: the file is empty"):
        read(tmp_path / "c.txt.gz")


def test_a_missing_column_is_an_error_naming_file_and_columns(tmp_path: Path) -> None:
    write_edu_parquet(tmp_path / "a.parquet", list(make_texts(3, seed=3)))
    with pytest.raises(DataError, match=r"a\.parquet: there is no column 'content'.*dump.*text"):
        read(tmp_path / "a.parquet", "content")
    for n_rows, limit in ((3, 100), (30, 5)):  # below and above the number of malformed rows that are allowed
        (tmp_path / "b.jsonl").write_bytes(as_jsonl(make_texts(n_rows, seed=3), "body"))
        with pytest.raises(
            DataError, match=r"b\.jsonl: there is no column 'text'; set data.text_column to one of body"
        ):
            read(tmp_path / "b.jsonl", max_bad_rows=limit)


def test_a_column_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    write_edu_parquet(tmp_path / "a.parquet", list(make_texts(3, seed=3)))
    with pytest.raises(DataError, match=r"a\.parquet: column 'score' holds double, not text"):
        read(tmp_path / "a.parquet", "score")


BAD_LINES = {
    '{"text": "trunc': "not valid JSON",
    "[1, 2]": "a JSON list, not an object",
    '{"other": 1}': "the text is missing",
    '{"text": null}': "the text is missing",
    '{"text": 7}': "of type int, not a string",
    r'{"text": "\ud800"}': "not valid Unicode",
}


def test_malformed_rows_are_reported_and_skipped_up_to_the_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    good = make_texts(len(BAD_LINES), seed=4)
    lines = [line for text, bad in zip(good, BAD_LINES, strict=True) for line in (bad, json.dumps({"text": text}))]
    path.write_text("\n".join(lines))
    files = Files(find_files(str(path)), "text", len(BAD_LINES))
    with caplog.at_level(logging.WARNING, logger="lt2titan"):
        assert list(files.documents()) == good
    assert files.bad_rows.count == len(BAD_LINES)
    for i, reason in enumerate(BAD_LINES.values()):
        assert f"{path}, line {2 * i + 1}: " in caplog.messages[i] and reason in caplog.messages[i]
    with pytest.raises(DataError, match=rf"a\.jsonl, line {len(lines) - 1}: .*data\.max_bad_rows = 5"):
        read(path, max_bad_rows=len(BAD_LINES) - 1)


def test_rows_without_text_are_counted_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_edu_parquet(path, ["one", None, "two", None])
    assert read(path, max_bad_rows=2) == ["one", "two"]
    with pytest.raises(DataError, match=r"a\.parquet, row 4: the text is missing.*data\.max_bad_rows = 1"):
        read(path, max_bad_rows=1)


def test_a_text_file_that_is_not_utf8_is_a_malformed_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "b.txt").write_text("fine")
    assert read(tmp_path, max_bad_rows=1) == ["fine"]
    with pytest.raises(DataError, match=r"a\.txt, byte 3"):
        read(tmp_path)


def test_paths_may_be_files_folders_patterns_and_lists(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    names = ["a.txt", "b.jsonl", "deep/c.txt", "deep/er/d.txt.gz", "x, y.txt"]
    for name in [*names, "notes.pdf"]:
        (tmp_path / name).write_text("x")

    def found(pattern: str) -> list[str]:
        return [str(p.relative_to(tmp_path)) for p in find_files(pattern)]

    assert found(f"{tmp_path}") == names
    assert found(f"{tmp_path}/*.txt") == ["a.txt", "x, y.txt"]
    assert found(f"{tmp_path}/**/*.txt*") == ["a.txt", "deep/c.txt", "deep/er/d.txt.gz", "x, y.txt"]
    assert found(f"{tmp_path}/b.jsonl, {tmp_path}/deep, {tmp_path}/*.jsonl") == names[1:4]
    assert found(f"{tmp_path}/x, y.txt") == ["x, y.txt"]
    with pytest.raises(DataError, match="no files match"):
        find_files(f"{tmp_path}/a.txt,{tmp_path}/*.parquet")
    with pytest.raises(DataError, match=r"notes\.pdf: not a supported kind"):
        find_files(f"{tmp_path}/notes*")
    with pytest.raises(DataError, match="dataset_path is empty"):
        find_files("")
