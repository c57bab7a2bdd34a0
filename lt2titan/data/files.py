"""Local text: ``.txt`` and ``.md`` (a file is a document), JSON lines and parquet (a row is one), also compressed."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lt2titan.data.errors import BadRows, DataError, problem_with_text

logger = logging.getLogger("lt2titan")

TEXT, JSON_LINES, PARQUET = (".txt", ".md"), (".jsonl", ".ndjson", ".json"), (".parquet",)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUPPORTED = f"{', '.join((*TEXT, *JSON_LINES, *PARQUET))}, each also with {', '.join(COMPRESSED)}"


def kind(path: Path) -> str:
    """The suffix that says what is in ``path``, without the one of a compression; "" if it is not supported."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    suffix = name.suffix.lower()
    return suffix if suffix in (*TEXT, *JSON_LINES, *PARQUET) else ""


def find_files(dataset_path: str) -> list[Path]:
    """Files that a path means: a file, a folder (searched to the bottom), a glob pattern, or a
    comma-separated list.

    Returns: absolute paths, sorted, each once.
    Raises: DataError if a part matches nothing, or names a file of an unsupported kind.
    """
    parts = [dataset_path] if Path(dataset_path).expanduser().exists() else dataset_path.split(",")
    found: set[Path] = set()
    for part in filter(None, (part.strip() for part in parts)):
        path = Path(part).expanduser()
        if path.is_dir():
            matches = [p for p in path.rglob("*") if p.is_file() and kind(p)]
        else:
            names = [str(path)] if path.is_file() else glob.glob(str(path), recursive=True)
            matches = [p for p in map(Path, names) if p.is_file()]
        if not matches:
            raise DataError(f"no files match {part!r} (from {Path.cwd()}); supported are {SUPPORTED}")
        unsupported = [p for p in matches if not kind(p)]
        if unsupported:
            raise DataError(f"{unsupported[0]}: not a supported kind of file; supported are {SUPPORTED}")
        found.update(p.resolve() for p in matches)
    if not found:
        raise DataError(
            "dataset_path is empty: give a file, a folder, a glob pattern or a comma-separated list of them"
        )
    return sorted(found)


class Files:
    """Documents of local files. Malformed rows are skipped up to a limit; unreadable files are errors."""

    def __init__(self, dataset_path: str, text_column: str, max_bad_rows: int) -> None:
        self.paths = find_files(dataset_path)
        self.text_column = text_column
        self.bad_rows = BadRows(max_bad_rows)
        stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in self.paths]
        for path in self.paths:
            if path.stat().st_size == 0:
                raise _empty(path)
        self.key = f"files:{text_column}:{stats!r}"
        self.description = f"{dataset_path} ({len(stats)} files, {sum(s for _, s, _ in stats) / 2**20:.1f} MiB)"

    def documents(self) -> Iterator[str]:
        """The texts, in the order of the sorted paths. Raises DataError naming the file."""
        for n_done, path in enumerate(self.paths):
            logger.debug("reading file %d of %d: %s", n_done + 1, len(self.paths), path)
            read = _READERS[kind(path)]
            try:
                yield from read(path, self.text_column, self.bad_rows)
            except (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise DataError(
                    f"{path}: cannot be read ({error}); it is truncated or corrupt: fetch it again or remove it"
                ) from error


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":  # pyarrow's reader notices a truncated stream, zstandard's does not
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)  # type: ignore[arg-type]
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(suffix, open)(path, "rb")


def _read_text(path: Path, text_column: str, bad_rows: BadRows) -> Iterator[str]:
    with _open(path) as file:
        content = file.read()
    if not content:
        raise _empty(path)
    try:
        yield content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad_rows.add(f"{path}, byte {error.start}", "the file is not UTF-8 text")


def _read_json_lines(path: Path, text_column: str, bad_rows: BadRows) -> Iterator[str]:
    columns: set[str] = set()
    without_column: list[str] = []  # rows seen before the first one that has the column
    is_empty = True
    with _open(path) as file:
        for n_line, line in enumerate(file, start=1):
            if not line.strip():
                continue
            is_empty = False
            where = f"{path}, line {n_line}"
            try:
                row = json.loads(line)
            except ValueError as error:  # also invalid UTF-8
                bad_rows.add(where, f"not valid JSON ({error})")
                continue
            if not isinstance(row, dict):
                bad_rows.add(where, f"a JSON {type(row).__name__}, not an object")
                continue
            columns.update(row)
            if text_column not in columns:
                without_column.append(where)
                if len(without_column) > bad_rows.limit:
                    raise _missing_column(path, text_column, columns)
                continue
            while without_column:
                bad_rows.add(without_column.pop(0), problem_with_text(None))
            problem = problem_with_text(row.get(text_column))
            if problem:
                bad_rows.add(where, problem)
            else:
                yield row[text_column]
    if is_empty:
        raise _empty(path)
    if without_column:
        raise _missing_column(path, text_column, columns)


def _read_parquet(path: Path, text_column: str, bad_rows: BadRows) -> Iterator[str]:
    source = str(path) if kind(path) == path.suffix.lower() else pa.BufferReader(_open(path).read())
    with pq.ParquetFile(source) as file:
        check_parquet(path, file.schema_arrow, file.metadata.num_rows, text_column)
        n_row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
            for text in batch.column(0).to_pylist():
                n_row += 1
                problem = problem_with_text(text)
                if problem:
                    bad_rows.add(f"{path}, row {n_row}", problem)
                else:
                    yield text


def check_parquet(path: Path, schema: pa.Schema, n_rows: int, text_column: str) -> None:
    """Raise DataError if the file has no rows, or no column ``text_column`` of strings."""
    if text_column not in schema.names:
        raise _missing_column(path, text_column, set(schema.names))
    column_type = schema.field(text_column).type
    value_type = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
    if not (pa.types.is_string(value_type) or pa.types.is_large_string(value_type)):
        raise DataError(f"{path}: column {text_column!r} holds {column_type}, not text; set data.text_column")
    if n_rows == 0:
        raise _empty(path)


def _empty(path: Path) -> DataError:
    return DataError(f"{path}: the file is empty; remove it from the dataset or restore it")


def _missing_column(path: Path, text_column: str, columns: set[str]) -> DataError:
    return DataError(
        f"{path}: there is no column {text_column!r}; set data.text_column to one of {', '.join(sorted(columns))}"
    )


_READERS: dict[str, Callable[[Path, str, BadRows], Iterator[str]]] = {
    **dict.fromkeys(TEXT, _read_text),
    **dict.fromkeys(JSON_LINES, _read_json_lines),
    **dict.fromkeys(PARQUET, _read_parquet),
}
