from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import byte_tokens, make_texts

from lt2titan.data.config import DataConfig
from lt2titan.data.errors import BadRows, DataError
from lt2titan.data.store import cached_store
from lt2titan.data.tokenizer import Tokenizer, build_tokenizer


class Texts:
    """A source in memory that counts how often it is read."""

    def __init__(self, texts: list[str], key: str = "texts") -> None:
        self.texts, self.key, self.description = texts, key, "texts of a test"
        self.bad_rows = BadRows(0)
        self.n_reads = 0

    def documents(self):
        self.n_reads += 1
        yield from self.texts


@pytest.fixture
def tokenizer() -> Tokenizer:
    return build_tokenizer(DataConfig())


def test_holds_the_documents_one_after_another(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = make_texts(2500, seed=1)  # more than one batch of the tokenizer
    store = cached_store(Texts([*texts[:7], "", *texts[7:]]), tokenizer, tmp_path)
    assert store.tokens.tolist() == byte_tokens(texts)
    assert store.offsets.tolist() == [0, *np.cumsum([len(t.encode()) + 2 for t in texts]).tolist()]
    assert store.n_bytes.tolist() == [len(t.encode()) for t in texts]


def test_is_built_once_and_keyed_by_source_and_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, bpe_folder: Path
) -> None:
    source = Texts(make_texts(10, seed=1))
    first = cached_store(source, tokenizer, tmp_path)
    assert cached_store(source, tokenizer, tmp_path).fingerprint == first.fingerprint
    assert source.n_reads == 1
    other = cached_store(source, build_tokenizer(DataConfig(tokenizer=str(bpe_folder))), tmp_path)
    without_bos = cached_store(source, build_tokenizer(DataConfig(add_bos=False)), tmp_path)
    assert source.n_reads == 3
    assert len({first.fingerprint, other.fingerprint, without_bos.fingerprint}) == 3


def test_the_fingerprint_is_of_the_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = make_texts(10, seed=1)
    first = cached_store(Texts(texts, "here"), tokenizer, tmp_path)
    moved = cached_store(Texts(texts, "there"), tokenizer, tmp_path)
    recut = cached_store(Texts([texts[0] + texts[1], *texts[2:]], "recut"), tokenizer, tmp_path)
    assert first.fingerprint == moved.fingerprint != recut.fingerprint


def test_vocabularies_over_65536_need_32_bits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.n_tokens = 2**16 + 1
    assert cached_store(Texts(["a"]), tokenizer, tmp_path).tokens.dtype == np.uint32


def test_no_text_is_an_error_and_leaves_nothing_behind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="texts of a test holds no text"):
        cached_store(Texts(["", ""]), tokenizer, tmp_path)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


def test_a_damaged_entry_is_built_again(tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    source = Texts(make_texts(10, seed=1))
    first = cached_store(source, tokenizer, tmp_path).tokens.tolist()
    (tokens_file,) = tmp_path.glob("*/tokens.bin")
    with open(tokens_file, "rb+") as file:
        file.truncate(100)
    with caplog.at_level(logging.WARNING, logger="lt2titan"):
        assert cached_store(source, tokenizer, tmp_path).tokens.tolist() == first
    assert "is damaged" in caplog.text


BUILDER = """
import sys, time
sys.path[:0] = [{tests!r}]
from pathlib import Path
from lt2titan.data.config import DataConfig
from lt2titan.data.store import cached_store
from lt2titan.data.tokenizer import build_tokenizer
from test_store import Texts
from corpora import make_texts

class Slow(Texts):
    def documents(self):
        for i, text in enumerate(self.texts):
            if i == 2000:
                print("reading", flush=True)
                time.sleep({pause})
            yield text

print("here", flush=True)
store = cached_store(Slow(make_texts(2500, seed=1)), build_tokenizer(DataConfig()), Path(sys.argv[1]))
print(store.fingerprint, flush=True)
"""


def start_builder(cache: Path, pause: float, **environment: str) -> subprocess.Popen[str]:
    code = BUILDER.format(tests=str(Path(__file__).parent), pause=pause)
    command = [sys.executable, "-c", code, str(cache)]
    builder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert builder.stdout is not None and builder.stdout.readline() == "here\n"
    return builder


def test_a_killed_build_is_taken_over(tmp_path: Path, tokenizer: Tokenizer) -> None:
    builder = start_builder(tmp_path, pause=60)
    assert builder.stdout is not None and builder.stdout.readline() == "reading\n"
    builder.send_signal(signal.SIGKILL)
    builder.communicate()
    (partial,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert "partial" in partial.name and (partial / "tokens.bin").exists()
    texts = make_texts(2500, seed=1)
    assert cached_store(Texts(texts), tokenizer, tmp_path).tokens.tolist() == byte_tokens(texts)
    assert not partial.exists()


def test_others_wait_for_the_builder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    builder = start_builder(tmp_path, pause=1)
    assert builder.stdout is not None and builder.stdout.readline() == "reading\n"
    source = Texts(make_texts(2500, seed=1))
    store = cached_store(source, tokenizer, tmp_path)
    assert source.n_reads == 0
    assert builder.communicate()[0].strip() == store.fingerprint


def test_local_rank_0_builds(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks are here first and wait all the same, so that the rank that logs is the one that works."""
    others = [start_builder(tmp_path, pause=0, LOCAL_RANK=rank) for rank in ("1", "2")]
    time.sleep(0.5)  # they are at it
    monkeypatch.setenv("LOCAL_RANK", "0")
    source = Texts(make_texts(2500, seed=1))
    store = cached_store(source, tokenizer, tmp_path)
    assert source.n_reads == 1
    for other in others:
        assert other.communicate()[0].split() == [store.fingerprint]  # without "reading"


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_a_full_disk_is_an_error_naming_the_folder(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writing raises OSError half-way."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
    code += BUILDER.format(tests=str(Path(__file__).parent), pause=0)
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert f"DataError: the cache folder {tmp_path} cannot be used" in message and "data.cache_folder" in message
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []
