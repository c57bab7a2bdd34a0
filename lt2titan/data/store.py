"""A tokenised dataset: one array of token ids, cut into documents; in memory or memory-mapped from the cache
folder.

A cache entry is a folder that appears by one atomic rename when everything in it is on disk, so whatever
happens to the process that builds it (killed, full disk), a folder that exists is complete. Its name is a
hash of what it was made from. ``fingerprint`` is a hash of what is in it: that is what a data state refers
to, so a copy of the dataset elsewhere, or with other file times, resumes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock

from lt2titan.data.errors import BadRows, DataError
from lt2titan.data.tokenizer import Tokenizer

logger = logging.getLogger("lt2titan")

FORMAT = 1  # of the cache folder; part of its name
TEXTS_PER_BATCH, CHARACTERS_PER_BATCH = 1024, 4 << 20
SECONDS_BETWEEN_LOGS = 10.0
SECONDS_FOR_LOCAL_RANK_0 = 30.0


class Source(Protocol):
    """Where documents come from."""

    key: str
    """Identifies the content as well as can be known without reading it."""

    description: str
    bad_rows: BadRows

    def documents(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class TokenStore:
    """Documents as token ids.

    Attributes:
        tokens: (n_tokens,) unsigned ids of all documents, one after another.
        offsets: (n_documents + 1,) int64; document i is ``tokens[offsets[i] : offsets[i + 1]]``.
        n_bytes: (n_documents,) int64, UTF-8 bytes of text that each document stands for.
        fingerprint: hash of the three arrays.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    n_bytes: np.ndarray
    fingerprint: str

    @property
    def n_documents(self) -> int:
        return len(self.n_bytes)


class _Fingerprint:
    """Hash of the arrays of a store, fed piece by piece; how they are cut into pieces does not matter."""

    def __init__(self) -> None:
        self._hashes = [hashlib.blake2b(digest_size=16) for _ in range(3)]

    def update(self, *arrays: np.ndarray) -> None:
        for digest, array in zip(self._hashes, arrays, strict=True):
            digest.update(np.ascontiguousarray(array).data)

    def hexdigest(self) -> str:
        return hashlib.blake2b(b"".join(h.digest() for h in self._hashes), digest_size=16).hexdigest()


def store_in_memory(tokens: np.ndarray, offsets: np.ndarray, n_bytes: np.ndarray) -> TokenStore:
    """A store of given arrays."""
    fingerprint = _Fingerprint()
    fingerprint.update(tokens, offsets, n_bytes)
    return TokenStore(tokens, offsets, n_bytes, fingerprint.hexdigest())


def tokenise(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[list[np.ndarray], list[int]]]:
    """Batches of (ids of each document with BOS and EOS, UTF-8 bytes of each); empty texts are left out."""
    batch: list[str] = []
    n_characters = 0
    for text in filter(None, texts):
        batch.append(text)
        n_characters += len(text)
        if len(batch) == TEXTS_PER_BATCH or n_characters >= CHARACTERS_PER_BATCH:
            yield tokenizer.encode_documents(batch, tokenizer.dtype), [len(text.encode()) for text in batch]
            batch, n_characters = [], 0
    if batch:
        yield tokenizer.encode_documents(batch, tokenizer.dtype), [len(text.encode()) for text in batch]


def cached_store(source: Source, tokenizer: Tokenizer, cache_folder: Path) -> TokenStore:
    """The tokenised ``source``, built once in ``cache_folder`` and memory-mapped from then on.

    One process per machine builds (local rank 0 if there is one) while the others wait. If machines share the
    folder and its file system has no locks across machines, each builds and the first to finish wins.

    Raises:
        DataError: unusable data, or a cache folder that cannot be written.
    """
    name = hashlib.blake2b(repr((FORMAT, source.key, tokenizer.key)).encode(), digest_size=16).hexdigest()
    folder = cache_folder / name
    if not _is_complete(folder):
        try:
            cache_folder.mkdir(parents=True, exist_ok=True)
            _build_once(source, tokenizer, folder)
        except (OSError, NotImplementedError) as error:  # filelock's word for a file system without locks
            raise DataError(
                f"the cache folder {cache_folder} cannot be used ({error}); free some space or set data.cache_folder"
            ) from error
    description = json.loads((folder / "description.json").read_text())
    store = TokenStore(
        tokens=np.memmap(folder / "tokens.bin", dtype=description["dtype"], mode="r"),
        offsets=np.memmap(folder / "offsets.bin", dtype=np.int64, mode="r"),
        n_bytes=np.memmap(folder / "n_bytes.bin", dtype=np.int64, mode="r"),
        fingerprint=description["fingerprint"],
    )
    logger.info(
        "data: %s: %s documents, %s tokens, %d malformed rows skipped (tokenised in %s)",
        source.description,
        f"{store.n_documents:,}",
        f"{len(store.tokens):,}",
        description["n_bad_rows"],
        folder,
    )
    return store


def _is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds what its description says. A missing folder is normal, a damaged one is reported."""
    if not folder.is_dir():
        return False
    try:
        description = json.loads((folder / "description.json").read_text())
        sizes = {name: (folder / name).stat().st_size for name in description["sizes"]}
        if sizes == description["sizes"]:
            return True
        problem = f"file sizes {sizes} instead of {description['sizes']}"
    except (OSError, ValueError, KeyError) as error:
        problem = str(error)
    logger.warning("the cached dataset %s is damaged (%s) and is built again", folder, problem)
    return False


def _build_once(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    partial = folder.with_suffix(f".partial-{socket.gethostname()}")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        _let_local_rank_0_start(folder, partial)
    with FileLock(folder.with_suffix(".lock")):
        if _is_complete(folder):
            return
        shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed; its lock is ours now
        shutil.rmtree(folder, ignore_errors=True)  # damaged, see _is_complete
        partial.mkdir()
        try:
            _write(source, tokenizer, partial)
            try:
                partial.rename(folder)
            except OSError:
                if not _is_complete(folder):  # else another machine was first
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _let_local_rank_0_start(folder: Path, partial: Path) -> None:
    """Wait until the work has begun, so that the rank that logs is the one that does it."""
    deadline = time.monotonic() + SECONDS_FOR_LOCAL_RANK_0
    while time.monotonic() < deadline and not folder.is_dir() and not partial.is_dir():
        time.sleep(0.1)


def _write(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    logger.info("data: tokenising %s into %s (once)", source.description, folder.parent)
    fingerprint = _Fingerprint()
    n_tokens, n_text_bytes, n_documents = 0, 0, 0
    start = last_log = time.monotonic()
    names = ("tokens.bin", "offsets.bin", "n_bytes.bin")
    with (
        open(folder / names[0], "wb") as tokens_file,
        open(folder / names[1], "wb") as offsets_file,
        open(folder / names[2], "wb") as n_bytes_file,
    ):
        outputs = (tokens_file, offsets_file, n_bytes_file)
        offsets = np.zeros(1, np.int64)
        fingerprint.update(np.empty(0, tokenizer.dtype), offsets, np.empty(0, np.int64))
        offsets_file.write(offsets.tobytes())
        for documents, document_bytes in tokenise(source.documents(), tokenizer):
            arrays = (
                np.concatenate(documents),
                n_tokens + np.cumsum([len(d) for d in documents], dtype=np.int64),
                np.array(document_bytes, np.int64),
            )
            fingerprint.update(*arrays)
            for output, array in zip(outputs, arrays, strict=True):
                output.write(array.tobytes())
            n_documents += len(documents)
            n_tokens += len(arrays[0])
            n_text_bytes += int(arrays[2].sum())
            now = time.monotonic()
            if now - last_log > SECONDS_BETWEEN_LOGS:
                last_log = now
                logger.info(
                    "data: tokenised %s documents, %.2f GB of text, %s tokens (%.2f million tokens/s)",
                    f"{n_documents:,}",
                    n_text_bytes / 1e9,
                    f"{n_tokens:,}",
                    n_tokens / (now - start) / 1e6,
                )
        for output in outputs:
            output.flush()
            os.fsync(output.fileno())
    if n_tokens == 0:
        raise DataError(f"{source.description} holds no text")
    description = {
        "source": source.description,
        "tokenizer": tokenizer.key,
        "dtype": tokenizer.dtype.name,
        "n_documents": n_documents,
        "n_tokens": n_tokens,
        "n_text_bytes": n_text_bytes,
        "n_bad_rows": source.bad_rows.count,
        "fingerprint": fingerprint.hexdigest(),
        "sizes": {name: (folder / name).stat().st_size for name in names},
    }
    (folder / "description.json").write_text(json.dumps(description, indent=2) + "\n")
