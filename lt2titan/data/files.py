"""Local text: ``.txt`` and ``.md`` (a file is a document), JSON lines and parquet (a row is one), also compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lt2titan.data.errors import BadRows, DataError, Malformed, text_or_malformed
from lt2titan.data.find import JSON_LINES, PARQUET, kind

logger = logging.getLogger("lt2titan")

Row = tuple[int, "str | Malformed"]
"""(number of the row in its file from 0 on, its text)"""


class Files:
    """Documents of local files. Malformed rows are skipped up to a limit; unreadable files are errors."""

    def __init__(self, paths: list[Path], text_column: str, max_bad_rows: int) -> None:
        self.paths, self.text_column = paths, text_column
        self.bad_rows = BadRows(max_bad_rows)
        stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
        for path in paths:
            _check_size(path)
        self.key = f"files:{text_column}:{stats!r}"
        self.description = f"{_name(paths)} ({sum(size for _, size, _ in stats) / 2**20:.1f} MiB)"

    def documents(self) -> Iterator[str]:
        """The texts, in the order of the paths. Raises DataError naming the file."""
        for n_done, path in enumerate(self.paths):
            logger.debug("reading file %d of %d: %s", n_done + 1, len(self.paths), path)
            for _, text in read_rows(path, self.text_column, self.bad_rows.limit):
                if isinstance(text, Malformed):
                    self.bad_rows.add(text)
                else:
                    yield text


class FileStream:
    """Local files as a stream: each is a shard. All are looked at first, so that a bad one does not end a long run."""

    def __init__(self, paths: list[Path], text_column: str, max_bad_rows: int) -> None:
        self.paths, self.text_column, self.max_bad_rows = paths, text_column, max_bad_rows
        for path in paths:
            _check_size(path)
            if path.suffix.lower() in PARQUET:
                with _named_errors(path):
                    metadata = pq.read_metadata(path)
                    _check_parquet(path, metadata.schema.to_arrow_schema(), metadata.num_rows, text_column)
        self.n_shards = len(paths)
        self.name = _name(paths)
        # A dataset may move between machines, so a data state names its files, not their folder.
        self.identity = f"files:{[path.name for path in paths]}:{text_column}"

    def shard_rows(self, shard: int, first_row: int) -> Iterator[Row]:
        rows = read_rows(self.paths[shard], self.text_column, self.max_bad_rows)
        return (row for row in rows if row[0] >= first_row)


def read_rows(path: Path, text_column: str, max_bad_rows: int) -> Iterator[Row]:
    """Every row of a file.

    Args:
        max_bad_rows: lines without ``text_column`` at a JSON-lines file's beginning before it counts as missing.
    Raises:
        DataError: the file is truncated, corrupt, empty, or lacks the column. The message names it.
    """
    with _named_errors(path):
        suffix = kind(path)
        if suffix in JSON_LINES:
            yield from _read_json_lines(path, text_column, max_bad_rows)
        else:
            yield from (_read_parquet if suffix in PARQUET else _read_text)(path, text_column)


class _named_errors:
    """Turn the errors of reading ``path`` into a DataError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError)):
            raise DataError(
                f"{self.path}: cannot be read ({error}); it is truncated or corrupt: fetch it again or remove it"
            ) from error


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":  # pyarrow's reader notices a truncated stream, zstandard's does not
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)  # type: ignore[arg-type]
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(suffix, open)(path, "rb")


def _read_text(path: Path, text_column: str) -> Iterator[Row]:
    with _open(path) as file:
        content = file.read()
    if not content:
        raise _empty(path)
    try:
        yield 0, content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield 0, Malformed(f"{path}, byte {error.start}", "the file is not UTF-8 text")


def _read_json_lines(path: Path, text_column: str, max_bad_rows: int) -> Iterator[Row]:
    columns: set[str] = set()
    without_column: list[int] = []  # rows seen before the first one that has the column
    is_empty = True
    with _open(path) as file:
        for n, line in enumerate(file):
            if not line.strip():
                continue
            is_empty = False
            row = _parse(line, f"{path}, line {n + 1}")
            if isinstance(row, Malformed):
                yield n, row
                continue
            columns.update(row)
            if text_column not in columns:
                without_column.append(n)
                if len(without_column) > max_bad_rows:
                    raise _missing_column(path, text_column, columns)
                continue
            for earlier in without_column:
                yield earlier, text_or_malformed(None, f"{path}, line {earlier + 1}")
            without_column = []
            yield n, text_or_malformed(row.get(text_column), f"{path}, line {n + 1}")
    if is_empty:
        raise _empty(path)
    if without_column:
        raise _missing_column(path, text_column, columns)


def _parse(line: bytes, where: str) -> dict[str, Any] | Malformed:
    try:
        row = json.loads(line)
    except ValueError as error:  # also invalid UTF-8
        return Malformed(where, f"not valid JSON ({error})")
    return row if isinstance(row, dict) else Malformed(where, f"a JSON {type(row).__name__}, not an object")


def _read_parquet(path: Path, text_column: str) -> Iterator[Row]:
    source = str(path) if kind(path) == path.suffix.lower() else pa.BufferReader(_open(path).read())
    with pq.ParquetFile(source) as file:
        _check_parquet(path, file.schema_arrow, file.metadata.num_rows, text_column)
        n = 0
        for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
            for text in batch.column(0).to_pylist():
                yield n, text_or_malformed(text, f"{path}, row {n + 1}")
                n += 1


def _check_parquet(path: Path, schema: pa.Schema, n_rows: int, text_column: str) -> None:
    """Raise DataError if the file has no rows, or no column ``text_column`` of strings."""
    if text_column not in schema.names:
        raise _missing_column(path, text_column, set(schema.names))
    column_type = schema.field(text_column).type
    value_type = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
    if not (pa.types.is_string(value_type) or pa.types.is_large_string(value_type)):
        raise DataError(f"{path}: column {text_column!r} holds {column_type}, not text; set data.text_column")
    if n_rows == 0:
        raise _empty(path)


def _check_size(path: Path) -> None:
    if path.stat().st_size == 0:
        raise _empty(path)


def _name(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} other files"


def _empty(path: Path) -> DataError:
    return DataError(f"{path}: the file is empty; remove it from the dataset or restore it")


def _missing_column(path: Path, text_column: str, columns: set[str]) -> DataError:
    return DataError(
        f"{path}: there is no column {text_column!r}; set data.text_column to one of {', '.join(sorted(columns))}"
    )
