"""Where the key blocks of packed documents lie, and the queries that look at them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BlockLayout(NamedTuple):
    """Blocks of ``block_size`` keys that start anew with every document; all tensors int32, on one device.

    Queries (T of them) and keys (Tk) are counted over their flattened rows. Both are tokens of the same documents; keys
    may be more, the queries being those of the last ones, and a document may have no query. Blocks are counted over all
    documents (C = Tk // block_size + N, which depends on the two counts alone, so that nobody waits for the device;
    those past the last document's are empty).

    cu_seqlens, cu_seqlens_k: (N + 1,) boundaries of the documents over queries and over keys.
    query_position: (T,) each query's place in its document.
    query_start: (T,) the first key of its document.
    query_block: (T,) the first block of its document.
    key_block: (Tk,) the block of each key.
    block_start: (C,) the first key of each block; Tk if it is empty.
    block_stop: (C,) the end of its document; Tk if it is empty.
    block_query: (C,) the place that the block's first token has among the queries, or would have if there were as many:
        it can be that of another document's query, or below 0. T if the block is empty.
    seen_from, seen_until: (C,) the first query that the whole block is past to, and the end of those; equal if none is.
    """

    cu_seqlens: Tensor
    cu_seqlens_k: Tensor
    query_position: Tensor
    query_start: Tensor
    query_block: Tensor
    key_block: Tensor
    block_start: Tensor
    block_stop: Tensor
    block_query: Tensor
    seen_from: Tensor
    seen_until: Tensor


def block_layout(
    batch: int,
    length: int,
    block_size: int,
    cu_seqlens: Tensor | None,
    device: torch.device,
    *,
    length_k: int = 0,
    cu_seqlens_k: Tensor | None = None,
) -> BlockLayout:
    """The blocks of rows of keys, each a document, or of the documents packed into one row. No synchronisation.

    Args:
        batch, length: rows, and queries in each.
        cu_seqlens: (N + 1,) boundaries of packed documents over the queries of the one row; None: rows are documents.
        length_k: keys in each row, of which the last are the queries'; 0: as many as queries.
        cu_seqlens_k: (N + 1,), the same documents' boundaries over the keys, each at least as long and ending at the
            same token; None: those of the queries.
    """
    n_queries, n_keys = batch * length, batch * (length_k or length)
    if cu_seqlens is None:
        cu_seqlens, cu_seqlens_k = (torch.arange(0, n + 1, n // batch, device=device) for n in (n_queries, n_keys))
    bounds = cu_seqlens.to(torch.int32)
    bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.to(torch.int32)
    n_blocks = n_keys // block_size + bounds.numel() - 1
    blocks_until = ((bounds_k.diff() + block_size - 1) // block_size).cumsum(0, dtype=torch.int32)
    first_block = torch.cat([blocks_until.new_zeros(1), blocks_until])
    queries, keys, blocks = (torch.arange(n, dtype=torch.int32, device=device) for n in (n_queries, n_keys, n_blocks))
    ahead = bounds_k - bounds  # of a query's place, its key's; at a document's end
    # Empty documents end where they start, so that nothing is found in them.
    document_of_query = torch.bucketize(queries, bounds[1:], right=True)
    query_start = bounds_k[document_of_query]
    document_of_key = torch.bucketize(keys, bounds_k[1:], right=True)
    document = torch.bucketize(blocks, blocks_until, right=True)
    is_empty = blocks >= blocks_until[-1]
    document = document.masked_fill(is_empty, 0)
    start = bounds_k[document] + (blocks - first_block[document]) * block_size
    block_query = start - ahead[document + 1]
    seen_until = bounds[document + 1]
    seen_from = torch.maximum(block_query + block_size - 1, bounds[document]).minimum(seen_until)
    return BlockLayout(
        bounds,
        bounds_k,
        queries + ahead[document_of_query + 1] - query_start,
        query_start,
        first_block[document_of_query],
        first_block[document_of_key] + (keys - bounds_k[document_of_key]) // block_size,
        start.masked_fill(is_empty, n_keys),
        bounds_k[document + 1].masked_fill(is_empty, n_keys),
        block_query.masked_fill(is_empty, n_queries),
        seen_from.masked_fill(is_empty, n_queries),
        seen_until.masked_fill(is_empty, n_queries),
    )
