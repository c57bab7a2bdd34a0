from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from corpora import make_texts

from lt2titan.config.section import ConfigError
from lt2titan.data.config import DataConfig
from lt2titan.data.tokenizer import Tokenizer, build_tokenizer


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe_folder: Path) -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer="bytes" if request.param == "bytes" else str(bpe_folder)))


def test_round_trip(tokenizer: Tokenizer) -> None:
    for text in [*make_texts(20, seed=5), "", " leading and trailing ", "tab\tand\nnewline"]:
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_documents_stand_between_bos_and_eos(tokenizer: Tokenizer) -> None:
    texts = make_texts(5, seed=6)
    for text, ids in zip(texts, tokenizer.encode_documents(texts, tokenizer.dtype), strict=True):
        assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert ids.dtype == np.uint16


def test_bytes_are_utf8() -> None:
    tokenizer = build_tokenizer(DataConfig(add_eos=False))
    assert tokenizer.encode_documents(["aé"], tokenizer.dtype)[0].tolist() == [256, 97, 195, 169]
    assert tokenizer.decode([256, 97, 195, 257]) == "a\ufffd"


def test_long_texts_are_not_truncated(bpe_folder: Path) -> None:
    """The fixture's file asks for truncation to 8 tokens."""
    tokenizer = build_tokenizer(DataConfig(tokenizer=str(bpe_folder)))
    text = "fox " * 50
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_text_are_text(bpe_folder: Path) -> None:
    tokenizer = build_tokenizer(DataConfig(tokenizer=str(bpe_folder)))
    ids = tokenizer.encode("a</s>b<s>")
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a</s>b<s>"


def test_bos_and_eos_by_usual_name_config_and_setting(bpe_folder: Path, tmp_path: Path) -> None:
    by_name = build_tokenizer(DataConfig(tokenizer=str(bpe_folder)))
    assert (by_name.bos_id, by_name.eos_id) == (0, 1)
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path)
    config = {"bos_token": {"content": "</s>"}, "eos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    by_config = build_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    assert (by_config.bos_id, by_config.eos_id) == (1, 0)
    by_setting = build_tokenizer(DataConfig(tokenizer=str(tmp_path), bos_token="<s>", eos_token="!"))
    assert by_setting.bos_id == 0
    assert by_setting.decode([by_setting.eos_id]) == "!"
    assert len({by_name.key, by_config.key, by_setting.key}) == 3


def test_a_missing_special_token_lists_the_candidates(bpe_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.bos_token = .*<nope>.*<s>, </s>.*add_bos = false"):
        build_tokenizer(DataConfig(tokenizer=str(bpe_folder), bos_token="<nope>"))
    without = build_tokenizer(DataConfig(tokenizer=str(bpe_folder), bos_token="<nope>", add_bos=False))
    assert without.bos_id == -1
    assert without.encode("x", bos=True) == without.encode("x")
