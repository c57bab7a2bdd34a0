"""Streamed text against decoding everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lt2titan.data.config import DataConfig
from lt2titan.data.tokenizer import Tokenizer, build_tokenizer
from lt2titan.inference.detokenize import TextStream

TEXT = "naïve café, 東京 and 🙂👍🏽 loops:  two spaces\n\tend é"


def byte_level() -> object:
    """As GPT-2 and Llama 3: a token is some bytes, also parts of characters."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([TEXT, "two loops and 東方 end"] * 3, trainer)
    return library


def sentence_piece() -> object:
    """As Llama 2: spaces are letters, the first is taken off, and characters it lacks are written as bytes."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers

    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz,:"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "▁a"]
    library = Library(
        models.BPE({name: i for i, name in enumerate(names)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return library


@pytest.fixture(params=["bytes", "byte_level", "sentence_piece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "bytes":
        return build_tokenizer(DataConfig(tokenizer="bytes"))
    library = {"byte_level": byte_level, "sentence_piece": sentence_piece}[request.param]()
    library.save(str(tmp_path / "tokenizer.json"))  # type: ignore[attr-defined]
    return build_tokenizer(DataConfig(tokenizer=str(tmp_path)))


def test_pieces_are_whole_characters_and_together_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, bos=True, eos=True)
    assert len(ids) > len(TEXT.split())
    whole = tokenizer.decode(ids)
    assert whole == TEXT
    for n_prompt in range(1, len(ids)):
        prompt = tokenizer.decode(ids[:n_prompt])
        if prompt.endswith("\ufffd"):
            continue  # a prompt is a text, not half a character
        stream = TextStream(tokenizer, ids[:n_prompt])
        pieces = [stream.push(token) for token in ids[n_prompt:]]
        assert not any("\ufffd" in piece for piece in pieces)
        assert prompt + "".join(pieces) == whole
        assert stream.end() == ""


def test_a_piece_comes_with_the_token_that_completes_it() -> None:
    tokenizer = build_tokenizer(DataConfig(tokenizer="bytes"))
    stream = TextStream(tokenizer, tokenizer.encode("a"))
    assert [stream.push(token) for token in tokenizer.encode("bé東!")] == ["b", "", "é", "", "", "東", "!"]


def test_bytes_that_are_no_character_are_replaced(tokenizer: Tokenizer) -> None:
    cut = tokenizer.encode("x 🙂")[:-1]
    stream = TextStream(tokenizer, cut[:1])
    pieces = [stream.push(token) for token in cut[1:]]
    assert "\ufffd" not in "".join(pieces)
    rest = stream.end()
    assert set(rest.lstrip(" ")) == {"\ufffd"}  # a token may hold a space and half a character
    assert tokenizer.decode(cut[:1]) + "".join(pieces) + rest == tokenizer.decode(cut)
    assert stream.end() == ""


def test_a_broken_character_holds_back_no_more_than_itself() -> None:
    stream = TextStream(build_tokenizer(DataConfig(tokenizer="bytes")), [97])
    assert [stream.push(token) for token in (0xE6, 0x9D, 98, 99)] == ["", "", "\ufffdb", "c"]
