"""The ``[data]`` section: how text becomes token batches. Importable without torch.

Which text is read (``training.dataset``, ``training.dataset_path`` and their ``validation`` twins) belongs to
other sections; the names that those may take are ``DATASET_NAMES``.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lt2titan.config.section import ConfigError, require

DATASET_NAMES = ("python_docs", "synthetic", "files", "huggingface")

BYTES = "bytes"
"""Name of the built-in tokenizer: 256 byte values, BOS = 256, EOS = 257."""

BYTES_VOCABULARY = 258


@dataclass(kw_only=True, slots=True)
class DataConfig:
    tokenizer: str = BYTES
    """Either "bytes", or the path of a tokenizer.json or of a folder that holds one."""

    add_bos: bool = True
    """Put the beginning-of-sequence token before each document."""

    add_eos: bool = True
    """Put the end-of-sequence token after each document."""

    bos_token: str = ""
    """The BOS token's text ("" = from tokenizer_config.json beside the tokenizer, else by its usual names)."""

    eos_token: str = ""
    """The EOS token's text ("" = from tokenizer_config.json beside the tokenizer, else by its usual names)."""

    text_column: str = "text"
    """Column of a parquet, JSON-lines or Hugging Face dataset that holds the text."""

    hf_name: str = ""
    """Configuration of a Hugging Face dataset, e.g. "sample-100BT" ("" = its default)."""

    hf_split: str = "train"
    """Split of a Hugging Face dataset; local files are read whole."""

    streaming: bool = False
    """Read a Hugging Face dataset while training, without an index. Resumes only at the same data-parallel degree."""

    document_mask: bool = False
    """Packed documents do not see each other: batches carry cu_seqlens, positions restart at each document."""

    max_documents_per_sample: int = 64
    """With document_mask: room for this many documents per sample in cu_seqlens, whose length is fixed for
    torch.compile. A batch with more doubles the length (and compiles once more); documents are never merged."""

    shuffle: bool = True
    """Shuffle documents and windows (indexed), or shards and blocks of documents (streaming), anew in each epoch."""

    shuffle_buffer: int = 2048
    """Streaming: documents are shuffled in blocks of this many; a resumed run reads up to two blocks again."""

    seed: int = 42
    """Seed of the data order, apart from the model's seed."""

    max_bad_rows: int = 100
    """Malformed rows (bad JSON, no text in the row) that are reported and skipped before it is an error. A stream's
    are counted on each rank anew in each epoch."""

    holdout_documents: int = 64
    """Whole documents kept out of training for validation, whether it is on or not, unless validation has a dataset of
    its own; a tenth of a small dataset. Which ones does not depend on the seed. A stream holds out its first ones."""

    cache_folder: str = ""
    """Where tokenised datasets are kept ("" = lt2titan/tokens in XDG_CACHE_HOME or ~/.cache)."""

    num_workers: int = 0
    """Threads that prepare batches ahead of the training loop (0 = batches are made when asked for). A stream
    is read by one thread at most. The order of the data does not depend on it."""

    prefetch_factor: int = 2
    """Batches that each worker prepares ahead."""

    def validate(self) -> None:
        """Raise ConfigError for a value that cannot work."""
        require(self.tokenizer != "", self, "tokenizer", 'must be "bytes" or a path to a tokenizer.json')
        for field in ("bos_token", "eos_token"):
            unused = self.tokenizer != BYTES or getattr(self, field) == ""
            require(unused, self, field, 'the "bytes" tokenizer has its own BOS and EOS; leave it empty')
        require(self.text_column != "", self, "text_column", "must name a column")
        require(self.hf_split != "", self, "hf_split", 'must name a split, e.g. "train"')
        require(self.max_documents_per_sample >= 1, self, "max_documents_per_sample", "must be at least 1")
        require(self.shuffle_buffer >= 1, self, "shuffle_buffer", "must be at least 1")
        require(0 <= self.seed < 2**63, self, "seed", "must be between 0 and 2^63 - 1")
        require(self.max_bad_rows >= 0, self, "max_bad_rows", "must be 0 or more")
        require(self.holdout_documents >= 0, self, "holdout_documents", "must be 0 or more")
        require(self.num_workers >= 0, self, "num_workers", "must be 0 or more")
        require(self.prefetch_factor >= 1, self, "prefetch_factor", "must be at least 1")

    def cache_path(self) -> Path:
        """Folder of the tokenised datasets."""
        if self.cache_folder:
            return Path(self.cache_folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lt2titan" / "tokens"


def dataset_error(dataset: str, dataset_path: str) -> ConfigError | None:
    """What is wrong with the name of a dataset, or with the lack of its path; the key is relative to its section."""
    if dataset not in DATASET_NAMES:
        nearest = difflib.get_close_matches(dataset, DATASET_NAMES, n=1)
        suggestion = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return ConfigError("dataset", dataset, f"must be one of {list(DATASET_NAMES)}{suggestion}")
    if dataset in ("files", "huggingface") and not dataset_path:
        reason = f"dataset = {dataset!r} needs it: a path, folder or glob pattern"
        if dataset == "huggingface":
            reason += ", or the name of a dataset of the hub"
        return ConfigError("dataset_path", dataset_path, reason)
    if dataset == "synthetic" and dataset_path and not dataset_path.isdecimal():
        return ConfigError(
            "dataset_path", dataset_path, "is the seed of the synthetic language: a whole number or empty"
        )
    return None


def require_dataset(section: Any) -> None:
    """Refuse a ``section`` ([training] or [validation]) whose ``dataset`` is unknown or lacks its ``dataset_path``."""
    error = dataset_error(section.dataset, section.dataset_path)
    if error is not None:
        raise error


def tokenizer_file(data: DataConfig) -> Path:
    """The tokenizer.json that ``data.tokenizer`` (a file or a folder) means. Raises ConfigError if there is none."""
    path = Path(data.tokenizer).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            "data.tokenizer",
            data.tokenizer,
            f'there is no file {path}; give "bytes", a tokenizer.json, or a folder that holds one',
        )
    return path


def vocabulary_size(data: DataConfig) -> int:
    """Largest token id + 1 of ``data.tokenizer``, read from its JSON (no tokenizers library, well under a
    second).

    Raises:
        ConfigError: there is no such file, or it is not a tokenizer.json.
    """
    if data.tokenizer == BYTES:
        return BYTES_VOCABULARY
    path = tokenizer_file(data)
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        vocabulary: Any = description["model"]["vocab"]  # a dict, or a list of (token, score) in Unigram models
        added = [token["id"] for token in description.get("added_tokens") or []]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{path} is not a tokenizer.json of the tokenizers library ({type(error).__name__}: {error})"
        raise ConfigError("data.tokenizer", data.tokenizer, reason) from error
    last = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    return max([last, *added]) + 1
