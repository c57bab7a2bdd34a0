"""Hugging Face ``datasets``: from the hub, or local parquet and JSON-lines files read by the same library."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lt2titan.data import files
from lt2titan.data.config import DataConfig
from lt2titan.data.errors import BadRows, DataError, problem_with_text

logger = logging.getLogger("lt2titan")

ROWS_PER_READ = 256


class HuggingFace:
    """The text column of a Hugging Face dataset, as documents (indexed) or as shards of rows (streaming)."""

    def __init__(self, data: DataConfig, dataset_path: str, *, streaming: bool) -> None:
        self.text_column = data.text_column
        self.bad_rows = BadRows(data.max_bad_rows)
        self._seen_bad_rows: set[tuple[str, int]] = set()  # a stream reads them again in each epoch
        local = _local_files(dataset_path, data.text_column)
        self.name = f"{dataset_path}{f' ({data.hf_name})' if data.hf_name else ''}, split {data.hf_split}"
        # A local dataset may move between machines, so a data state names its files, not their folder.
        source = [path.name for path in local] if local else [dataset_path, data.hf_name]
        self.identity = f"huggingface:{source}:{data.hf_split}:{data.text_column}"
        self._dataset = _load(data, dataset_path, local, streaming)
        if self._dataset.column_names is not None:
            self._check_columns(self._dataset.column_names)
        self.n_shards: int = self._dataset.num_shards if streaming else 1
        self._shard_names = [str(p) for p in local] if len(local) == self.n_shards else []
        self.key = f"{self.identity}:{'' if streaming else self._dataset._fingerprint}"
        self.description = f"the Hugging Face dataset {self.name}"

    def _check_columns(self, columns: list[str]) -> None:
        if self.text_column not in columns:
            raise DataError(
                f"{self.name}: there is no column {self.text_column!r}; set data.text_column to one of "
                f"{', '.join(sorted(columns))}"
            )

    def documents(self) -> Iterator[str]:
        """Every text of the (indexed) dataset, in its order."""
        for _, text in self._texts(self._dataset, self.name, first_row=0):
            if text is not None:
                yield text

    def shard_rows(self, shard: int, first_row: int) -> Iterator[tuple[int, str | None]]:
        """(row number, text) of one shard of the stream from ``first_row`` on; a malformed row's text is None.

        The position in a shard is a row number of ours, not the ``state_dict`` of ``datasets``: it holds in any
        version of that library and is no slower, since both skip by reading the shard from its beginning.
        """
        dataset = self._dataset.shard(num_shards=self.n_shards, index=shard)
        part = self._shard_names[shard] if self._shard_names else f"{self.name}, shard {shard}"
        return self._texts(dataset, part, first_row)

    def _texts(self, dataset: Any, part: str, first_row: int) -> Iterator[tuple[int, str | None]]:
        from datasets.exceptions import DatasetsError

        row = 0
        try:
            for table in dataset.with_format("arrow").iter(batch_size=ROWS_PER_READ):
                n_skipped = min(max(first_row - row, 0), table.num_rows)
                row += n_skipped
                if n_skipped == table.num_rows:
                    continue
                self._check_columns(table.column_names)
                for text in table.column(self.text_column).slice(n_skipped).to_pylist():
                    problem = problem_with_text(text)
                    if problem and (part, row) not in self._seen_bad_rows:
                        self._seen_bad_rows.add((part, row))
                        self.bad_rows.add(f"{part}, row {row + 1}", problem)
                    yield row, None if problem else text
                    row += 1
        except DataError:
            raise
        except (pa.ArrowException, OSError, EOFError, DatasetsError) as error:
            raise DataError(f"{part}: cannot be read after row {row}: {error}") from error


def _local_files(dataset_path: str, text_column: str) -> list[Path]:
    """Files that ``dataset_path`` means on this machine (none: it names a dataset of the hub), checked."""
    first = dataset_path.split(",")[0]
    looks_local = any(c in dataset_path for c in "*?,") or dataset_path.startswith(("/", ".", "~"))
    if not looks_local and not Path(first).exists():
        return []
    paths = files.find_files(dataset_path)
    kinds = {files.kind(path) for path in paths}
    if len(kinds) > 1 or kinds & set(files.TEXT):
        raise DataError(
            f"{dataset_path}: 'huggingface' reads local files of one kind, parquet or JSON lines, and found "
            f"{', '.join(sorted(kinds))}; name one kind or use training.dataset = 'files'"
        )
    for path in paths:
        if path.suffix.lower() in files.PARQUET:
            try:
                metadata = pq.read_metadata(path)
                files.check_parquet(path, metadata.schema.to_arrow_schema(), metadata.num_rows, text_column)
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{path}: cannot be read ({error}); it is truncated or corrupt: fetch it again or remove it"
                ) from error
        elif path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; remove it from the dataset or restore it")
    return paths


def _load(data: DataConfig, dataset_path: str, local: list[Path], streaming: bool) -> Any:
    import datasets

    arguments: dict[str, Any] = {"path": dataset_path, "name": data.hf_name or None}
    if local:
        builder = "parquet" if files.kind(local[0]) in files.PARQUET else "json"
        # Reading local files must not wait for the network: load_dataset would report the use to the hub.
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
        arguments = {"path": builder, "data_files": {data.hf_split: [str(path) for path in local]}}
    try:
        return datasets.load_dataset(**arguments, split=data.hf_split, streaming=streaming)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        advice = (
            "Fetch the damaged file again or remove it; training.dataset = 'files' names it, and skips malformed lines"
            if local
            else "Check the dataset's name, data.hf_name, data.hf_split, and that this machine reaches the hub or has "
            "the dataset in its cache"
        )
        raise DataError(f"{dataset_path}: datasets.load_dataset failed: {_with_causes(error)}. {advice}") from error


def _with_causes(error: BaseException | None) -> str:
    """The message and those of what caused it: ``datasets`` hides the reason there."""
    messages = []
    while error is not None:
        messages.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "; caused by ".join(dict.fromkeys(messages))
