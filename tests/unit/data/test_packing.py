from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from lt2titan.data.packing import IGNORED, BatchLayout, Piece, _say_once, bytes_per_target
from lt2titan.kernels.packing import make_chunk_indices


def piece(ids: list[int], *, start: bool = True, rate: float = 1.0) -> Piece:
    return Piece(np.array(ids, np.uint16), start, rate)


# Two rows of L = 6: the first ends in a document's middle, the second has a lone EOS and a document that begins
# with the row's last target.
WINDOWS = [
    [piece([11, 12, 13]), piece([21, 22, 23, 24], rate=0.5)],
    [piece([99], start=False), piece([31, 32, 33, 34, 35], rate=2.0), piece([41])],
]


def test_without_document_mask() -> None:
    batch = BatchLayout(seq_len=6).assemble(WINDOWS)
    assert batch.tokens.tolist() == [[11, 12, 13, 21, 22, 23], [99, 31, 32, 33, 34, 35]]
    assert batch.targets.tolist() == [[12, 13, 21, 22, 23, 24], [31, 32, 33, 34, 35, 41]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert batch.cu_seqlens is None and batch.chunk_indices is None
    assert batch.n_bytes.item() == 2 * 1.0 + 3 * 0.5 + 4 * 2.0
    assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == torch.int64


def test_with_document_mask() -> None:
    batch = BatchLayout(seq_len=6, document_mask=True, max_documents_per_sample=3).assemble(WINDOWS)
    assert batch.targets.tolist() == [[12, 13, -100, 22, 23, 24], [-100, 32, 33, 34, 35, -100]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 7, 12, 12, 12]
    assert batch.chunk_indices is not None
    assert torch.equal(batch.chunk_indices, make_chunk_indices(batch.cu_seqlens))
    assert batch.n_bytes.item() == 2 * 1.0 + 3 * 0.5 + 4 * 2.0


def test_short_and_missing_windows_are_filled_with_ignored_targets() -> None:
    windows = [[piece([1, 2, 3])], []]
    for mask in (False, True):
        batch = BatchLayout(seq_len=4, document_mask=mask, max_documents_per_sample=2).assemble(windows)
        assert batch.targets.tolist() == [[2, 3, IGNORED, IGNORED], [IGNORED] * 4]
        assert batch.n_bytes.item() == 2.0
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8, 8]


def test_documents_that_do_not_fit_double_the_room_and_are_never_merged(caplog: pytest.LogCaptureFixture) -> None:
    _say_once.cache_clear()
    windows = [[piece([i]) for i in range(9)], [piece(list(range(9)))]]
    layout = BatchLayout(seq_len=8, document_mask=True, max_documents_per_sample=2)
    with caplog.at_level(logging.WARNING, logger="lt2titan"):
        for _ in range(2):
            batch = layout.assemble(windows)
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [*range(9), 16, *[16] * 7]  # 2 rows x 8 + 1
    assert len(caplog.messages) == 1 and "data.max_documents_per_sample = 2" in caplog.messages[0]


def test_bytes_per_target() -> None:
    assert bytes_per_target(10, 6) == 2.0  # BOS is no target of its own document
    assert bytes_per_target(10, 1) == 0.0
