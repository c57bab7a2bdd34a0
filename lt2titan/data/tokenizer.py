"""Tokenizers: bytes, and any ``tokenizer.json`` of the tokenizers library."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lt2titan.config.section import ConfigError
from lt2titan.data.config import BYTES, BYTES_VOCABULARY, DataConfig, tokenizer_file

logger = logging.getLogger("lt2titan")

# Usual names, most specific first. GPT-2 and GPT-NeoX use one token for both ends.
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|bos|>", "[BOS]", "<|endoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "<|eos|>", "[EOS]")


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        n_tokens: largest id + 1.
        bos_id, eos_id: ids of BOS and EOS, -1 if there is none.
        key: identifies what ``encode_documents`` computes, for caches and data states.
    """

    n_tokens: int
    bos_id: int
    eos_id: int

    def __init__(self, *, add_bos: bool, add_eos: bool) -> None:
        self.add_bos, self.add_eos = add_bos, add_eos

    @property
    def key(self) -> str:
        bos = self.bos_id if self.add_bos else -1
        eos = self.eos_id if self.add_eos else -1
        return f"{self._name()}:bos={bos}:eos={eos}"

    @abstractmethod
    def _name(self) -> str: ...

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS. Special tokens written in a text are plain text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are left out, invalid UTF-8 becomes U+FFFD."""

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of one text, e.g. a prompt; ``bos`` and ``eos`` have no effect if the tokenizer has no such token."""
        ids = self.encode_batch([text])[0]
        return [self.bos_id] * (bos and self.bos_id >= 0) + ids + [self.eos_id] * (eos and self.eos_id >= 0)

    def encode_documents(self, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        """Ids of each text between BOS and EOS, as configured."""
        before, after = [self.bos_id] * self.add_bos, [self.eos_id] * self.add_eos
        return [np.array(before + ids + after, dtype=dtype) for ids in self.encode_batch(texts)]

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id."""
        return np.dtype(np.uint16 if self.n_tokens <= 2**16 else np.uint32)


class ByteTokenizer(Tokenizer):
    """Each UTF-8 byte is a token; BOS = 256, EOS = 257."""

    n_tokens, bos_id, eos_id = BYTES_VOCABULARY, 256, 257

    def _name(self) -> str:
        return BYTES

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_documents(self, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        before = np.full(int(self.add_bos), self.bos_id, dtype)
        after = np.full(int(self.add_eos), self.eos_id, dtype)
        return [np.concatenate([before, np.frombuffer(text.encode(), np.uint8), after]) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``, its BOS and EOS found by name."""

    def __init__(self, path: Path, *, add_bos: bool, add_eos: bool, bos_token: str, eos_token: str) -> None:
        from tokenizers import Tokenizer as Library  # not needed for bytes

        super().__init__(add_bos=add_bos, add_eos=add_eos)
        content = path.read_bytes()
        self._digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        try:
            self._library = Library.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception for a file it cannot read
            raise ConfigError("data.tokenizer", str(path), f"the tokenizers library cannot read it: {error}") from error
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # "</s>" in a web page is text, not the end of a document
        self.n_tokens = max(self._library.get_vocab(with_added_tokens=True).values()) + 1
        named = _named_tokens(path.with_name("tokenizer_config.json"))
        self.bos_id = self._find("bos_token", bos_token or named["bos_token"], BOS_NAMES, needed=add_bos)
        self.eos_id = self._find("eos_token", eos_token or named["eos_token"], EOS_NAMES, needed=add_eos)

    def _name(self) -> str:
        return self._digest

    def _find(self, field: str, name: str, usual_names: Sequence[str], *, needed: bool) -> int:
        candidates = [name] if name else usual_names
        for candidate in candidates:
            token_id = self._library.token_to_id(candidate)
            if token_id is not None:
                logger.info("tokenizer: data.%s is %r (%d)", field, candidate, token_id)
                return token_id
        if not needed:
            return -1
        special = [t.content for t in self._library.get_added_tokens_decoder().values()]
        switch = "add_bos" if field == "bos_token" else "add_eos"
        raise ConfigError(
            f"data.{field}",
            name,
            f"the tokenizer has no token {' or '.join(map(repr, candidates))}; choose one of its special tokens "
            f"({', '.join(special[:40]) or 'it has none'}) or set data.{switch} = false",
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids), skip_special_tokens=True)


def _named_tokens(path: Path) -> dict[str, str]:
    """BOS and EOS as a ``tokenizer_config.json`` names them ("" where it does not, or there is no such file)."""
    names = {"bos_token": "", "eos_token": ""}
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            for field in names:
                token = config.get(field) or ""
                names[field] = token["content"] if isinstance(token, dict) else token
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError("data.tokenizer", str(path), f"cannot be read ({error}); repair or remove it") from error
    return names


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that ``data`` asks for. Raises ConfigError if it cannot be read or has no BOS or EOS."""
    if data.tokenizer == BYTES:
        return ByteTokenizer(add_bos=data.add_bos, add_eos=data.add_eos)
    return JsonTokenizer(
        tokenizer_file(data),
        add_bos=data.add_bos,
        add_eos=data.add_eos,
        bos_token=data.bos_token,
        eos_token=data.eos_token,
    )
