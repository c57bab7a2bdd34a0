from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lt2titan.config.section import ConfigError
from lt2titan.data.config import DATASET_NAMES, DataConfig, vocabulary_size
from lt2titan.data.sources import SYNTHETIC, TEXT_SOURCES
from lt2titan.data.tokenizer import build_tokenizer


def test_imports_neither_torch_nor_tokenizers() -> None:
    code = "import sys, lt2titan.data.config; print({'torch', 'tokenizers', 'numpy', 'datasets'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_names_are_those_of_the_registry() -> None:
    assert set(DATASET_NAMES) == {*TEXT_SOURCES, SYNTHETIC}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer", ""),
        ("bos_token", "<s>"),  # with the bytes tokenizer
        ("text_column", ""),
        ("hf_split", ""),
        ("max_documents_per_sample", 0),
        ("shuffle_buffer", 0),
        ("seed", -1),
        ("max_bad_rows", -1),
        ("holdout_documents", -1),
        ("num_workers", -1),
        ("prefetch_factor", 0),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: object) -> None:
    DataConfig().validate()
    section = DataConfig(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        section.validate()
    assert caught.value.key == field


def test_vocabulary_size_equals_the_tokenizer_s(bpe_folder: Path) -> None:
    for name in ("bytes", str(bpe_folder), str(bpe_folder / "tokenizer.json")):
        data = DataConfig(tokenizer=name)
        assert vocabulary_size(data) == build_tokenizer(data).n_tokens


def test_vocabulary_size_counts_added_tokens_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    added = [{"id": 9, "content": "<s>"}]
    path.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 5}}, "added_tokens": added}))
    assert vocabulary_size(DataConfig(tokenizer=str(tmp_path))) == 10
    path.write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}))
    assert vocabulary_size(DataConfig(tokenizer=str(tmp_path))) == 2


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^data\.tokenizer = .*tokenizer\.json is not a tokenizer"):
        vocabulary_size(DataConfig(tokenizer=str(tmp_path)))


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.tokenizer = .*there is no file"):
        vocabulary_size(DataConfig(tokenizer=str(tmp_path / "none")))


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert DataConfig(cache_folder="/somewhere").cache_path() == Path("/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DataConfig().cache_path() == tmp_path / "lt2titan" / "tokens"
