"""Small seeded corpora, and what reads batches in these tests."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = "the quick brown fox jumps over a lazy dog naïve café 東京 emoji 🙂 loop linear time model state"


def make_texts(n: int, seed: int, longest: int = 60) -> list[str]:
    """``n`` different texts of 1 to ``longest`` words."""
    rng = random.Random(seed)
    return [f"{seed}-{i} " + " ".join(rng.choices(WORDS.split(), k=rng.randint(1, longest))) for i in range(n)]


def write_edu_parquet(path: Path, texts: list[str | None], row_group_size: int = 7) -> None:
    """A parquet file with the columns of FineWeb-Edu."""
    n = len(texts)
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{path.stem}-{i}>" for i in range(n)],
        "dump": ["CC-MAIN-2024-10"] * n,
        "url": [f"https://example.org/{i}" for i in range(n)],
        "file_path": ["s3://crawl/file.warc.gz"] * n,
        "language": ["en"] * n,
        "language_score": [0.9] * n,
        "token_count": [len(t.split()) if t else 0 for t in texts],
        "score": [3.1] * n,
        "int_score": [3] * n,
    }
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def byte_tokens(texts: list[str]) -> list[int]:
    """The row of tokens of documents in this order, with the bytes tokenizer: the naive way."""
    return [token for text in texts for token in (256, *text.encode(), 257)]


def decode_row(tokens: list[int]) -> list[str]:
    """The texts whose BOS and EOS are both in a row of byte tokens."""
    texts: list[str] = []
    current: list[int] | None = None
    for token in tokens:
        if token == 256:
            current = []
        elif token == 257 and current is not None:
            texts.append(bytes(current).decode())
            current = None
        elif current is not None:
            current.append(token)
    return texts
