"""Datasets of the Hugging Face hub, read by the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from lt2titan.data.config import DataConfig
from lt2titan.data.errors import BadRows, DataError, Malformed, text_or_malformed

ROWS_PER_READ = 256


class HuggingFace:
    """The text column of a dataset of the hub, as documents (indexed) or as shards of rows (streaming)."""

    def __init__(self, data: DataConfig, name: str, *, streaming: bool) -> None:
        self.text_column = data.text_column
        self.bad_rows = BadRows(data.max_bad_rows)
        self.name = f"{name}{f' ({data.hf_name})' if data.hf_name else ''}, split {data.hf_split}"
        self.identity = f"huggingface:{[name, data.hf_name]}:{data.hf_split}:{data.text_column}"
        self._dataset = _load(data, name, streaming)
        if self._dataset.column_names is not None:
            self._check_columns(self._dataset.column_names)
        self.n_shards: int = self._dataset.num_shards if streaming else 1
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
        for _, text in self._rows(self._dataset, self.name, first_row=0):
            if isinstance(text, Malformed):
                self.bad_rows.add(text)
            else:
                yield text

    def shard_rows(self, shard: int, first_row: int) -> Iterator[tuple[int, str | Malformed]]:
        """(row number, text) of one shard of the stream from ``first_row`` on.

        The position in a shard is a row number of ours, not the ``state_dict`` of ``datasets``: it holds in any
        version of that library and is no slower, since both skip by reading the shard from its beginning.
        """
        dataset = self._dataset.shard(num_shards=self.n_shards, index=shard)
        return self._rows(dataset, f"{self.name}, shard {shard}", first_row)

    def _rows(self, dataset: Any, part: str, first_row: int) -> Iterator[tuple[int, str | Malformed]]:
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
                    yield row, text_or_malformed(text, f"{part}, row {row + 1}")
                    row += 1
        except (pa.ArrowException, OSError, EOFError, DatasetsError) as error:
            raise DataError(f"{part}: cannot be read after row {row}: {_with_causes(error)}") from error


def _load(data: DataConfig, name: str, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, data.hf_name or None, split=data.hf_split, streaming=streaming)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: datasets.load_dataset failed: {_with_causes(error)}. There is no file or folder of this name "
            "here, so it was looked for on the hub: check the name, data.hf_name and data.hf_split, and that this "
            "machine reaches the hub or has the dataset in its cache"
        ) from error


def _with_causes(error: BaseException | None) -> str:
    """The message and those of what caused it: ``datasets`` hides the reason there."""
    messages = []
    while error is not None:
        messages.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "; caused by ".join(dict.fromkeys(messages))
