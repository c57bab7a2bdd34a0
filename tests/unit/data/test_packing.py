from __future__ import annotations

import logging
from dataclasses import replace

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


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("n_stretches", [1, 2, 3, 6])
def test_stretches_laid_side_by_side_are_the_whole(mask: bool, n_stretches: int) -> None:
    layout = BatchLayout(seq_len=6, document_mask=mask, max_documents_per_sample=3)
    whole = layout.assemble(WINDOWS)
    parts = [replace(layout, stretch=i, n_stretches=n_stretches).assemble(WINDOWS) for i in range(n_stretches)]
    for name in ("tokens", "targets", "positions"):
        together = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.equal(together, getattr(whole, name))
    assert sum(part.n_bytes.item() for part in parts) == pytest.approx(whole.n_bytes.item())
    if not mask:
        assert all(part.cu_seqlens is None and part.cu_seqlens_k is None for part in parts)
        return
    assert whole.cu_seqlens is not None
    document = torch.bucketize(torch.arange(12), whole.cu_seqlens[1:].long(), right=True).view(2, 6)
    for i, part in enumerate(parts):
        stop = (i + 1) * (6 // n_stretches)
        if n_stretches == 1:
            continue
        assert part.cu_seqlens is not None and part.cu_seqlens_k is not None and part.chunk_indices is not None
        assert part.cu_seqlens.dtype == part.cu_seqlens_k.dtype == torch.int32
        for bounds, start in ((part.cu_seqlens, stop - 6 // n_stretches), (part.cu_seqlens_k, 0)):
            expected = document[:, start:stop].flatten()
            assert len(bounds) == len(whole.cu_seqlens) and int(bounds[-1]) == len(expected)
            assert torch.equal(torch.repeat_interleave(torch.arange(6), bounds.diff()), expected)
        assert torch.equal(part.chunk_indices, make_chunk_indices(part.cu_seqlens))


@pytest.mark.parametrize("stretch", [{"n_stretches": 4}, {"stretch": 2, "n_stretches": 2}])
def test_stretches_that_do_not_exist_are_refused(stretch: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="6 tokens have no stretch"):
        BatchLayout(seq_len=6, **stretch)
