"""Where the key blocks of packed documents lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BlockLayout(NamedTuple):
    """Blocks of ``block_size`` tokens that start anew with every document; all tensors int32, on one device.

    Tokens are counted over the flattened rows (T of them), blocks over all documents (C = T // block_size + N, which
    depends on the two counts alone, so that nobody waits for the device; those past the last document's are empty).

    cu_seqlens: (N + 1,) boundaries of the documents.
    token_start: (T,) the first token of each token's document.
    token_block: (T,) the first block of each token's document.
    block_start: (C,) the first token of each block; T if it is empty.
    block_stop: (C,) the end of its document; T if it is empty.
    """

    cu_seqlens: Tensor
    token_start: Tensor
    token_block: Tensor
    block_start: Tensor
    block_stop: Tensor


def block_layout(
    batch: int, length: int, block_size: int, cu_seqlens: Tensor | None, device: torch.device
) -> BlockLayout:
    """The blocks of rows (batch, length), each a document; or of the documents that ``cu_seqlens`` (N + 1,) bounds in
    one row. No synchronisation."""
    n_tokens = batch * length
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, n_tokens + 1, length, device=device)
    bounds = cu_seqlens.to(torch.int32)
    n_blocks = n_tokens // block_size + bounds.numel() - 1
    blocks_until = ((bounds.diff() + block_size - 1) // block_size).cumsum(0, dtype=torch.int32)
    first_block = torch.cat([blocks_until.new_zeros(1), blocks_until])
    tokens, blocks = (torch.arange(n, dtype=torch.int32, device=device) for n in (n_tokens, n_blocks))
    # Empty documents end where they start, so that nothing is found in them.
    document_of_token = torch.bucketize(tokens, bounds[1:], right=True)
    document = torch.bucketize(blocks, blocks_until, right=True)
    is_empty = blocks >= blocks_until[-1]
    document = document.masked_fill(is_empty, 0)
    start = bounds[document] + (blocks - first_block[document]) * block_size
    return BlockLayout(
        bounds,
        bounds[document_of_token],
        first_block[document_of_token],
        start.masked_fill(is_empty, n_tokens),
        bounds[document + 1].masked_fill(is_empty, n_tokens),
    )
