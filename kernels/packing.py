"""Packed documents: several documents laid end to end in one row, separated by `cu_seqlens`.

`cu_seqlens` is (n_documents + 1,) int32: document n is tokens [cu_seqlens[n], cu_seqlens[n + 1]). Its last entry is the
number of tokens; repeats of it at the end are empty documents, so that its length can be fixed.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

CHUNK_SIZE = 64  # tokens per chunk of fla's kernels


def make_chunk_indices(cu_seqlens: Tensor, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """List the chunks of packed documents on the host, so that the kernels need no device synchronisation.

    Args:
        cu_seqlens: (n_documents + 1,) int tensor on the CPU.
        chunk_size: tokens per chunk; the kernels here expect 64.

    Returns:
        (n_tokens // chunk_size + n_documents, 2) int32 rows (document, chunk within that document), in order. How
        many depends only on the two counts, not on where documents end, so that compiled graphs do not change;
        rows that are not needed name a chunk past the end of the first document that has a token, which the kernels
        mask out (some read that document's last token first, so it must have one).
    """
    if cu_seqlens.device.type != "cpu":
        raise ValueError("make_chunk_indices: cu_seqlens must be on the CPU (its device copy would synchronise)")
    check_cu_seqlens(cu_seqlens, int(cu_seqlens[-1]))
    n_documents, n_tokens = cu_seqlens.numel() - 1, int(cu_seqlens[-1])
    n_chunks = (cu_seqlens.diff().long() + chunk_size - 1) // chunk_size
    document = torch.repeat_interleave(torch.arange(n_documents), n_chunks)
    chunk = torch.arange(document.numel()) - (n_chunks.cumsum(0) - n_chunks)[document]
    rows = torch.empty(n_tokens // chunk_size + n_documents, 2, dtype=torch.int32)
    rows[: document.numel()] = torch.stack([document, chunk], dim=1)
    rows[document.numel() :, 0] = document[0]
    rows[document.numel() :, 1] = -(-n_tokens // chunk_size)
    return rows


def check_cu_seqlens(cu_seqlens: Tensor, n_tokens: int) -> list[int]:
    """Return `cu_seqlens` as a list after checking that it covers `n_tokens` tokens; reads the values."""
    bounds: list[int] = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != n_tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens ({n_tokens}), got {bounds}")
    return bounds


def check_packed(name: str, batch: int, cu_seqlens: Tensor | None, initial_state: Tensor | None) -> int:
    """Check what packing asks of the shapes (no values are read) and return the number of sequences."""
    if cu_seqlens is None:
        n_sequences = batch
    else:
        if batch != 1 or cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name}: with cu_seqlens the documents lie in one row (batch 1, got {batch}) and cu_seqlens is a "
                f"1-D int32 tensor (got {cu_seqlens.dtype}, {cu_seqlens.dim()}-D)"
            )
        n_sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None and initial_state.shape[0] != n_sequences:
        raise ValueError(f"{name}: initial_state has {initial_state.shape[0]} rows for {n_sequences} sequences")
    return n_sequences


@overload
def contiguous(x: Tensor) -> Tensor: ...
@overload
def contiguous(x: None) -> None: ...
def contiguous(x: Tensor | None) -> Tensor | None:
    """fla's kernels read memory in order."""
    return None if x is None else x.contiguous()


def for_fla(cu_seqlens: Tensor | None, chunk_indices: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Make the index tensors fit for fla, computing the chunks if the caller did not (which synchronises).

    fla memoises what it derives from `cu_seqlens` by object identity, so a caller's buffer that is filled anew for
    every batch would bring back an earlier batch's offsets: hand fla a fresh tensor object per call.
    """
    if cu_seqlens is None:
        return None, None
    if chunk_indices is None:
        chunk_indices = make_chunk_indices(cu_seqlens.cpu()).to(cu_seqlens.device)
    return cu_seqlens.detach(), chunk_indices
