from __future__ import annotations

import numpy as np
import torch

from lt2titan.data.device import model_inputs
from lt2titan.data.packing import BatchLayout, Piece

CPU = torch.device("cpu")
WINDOWS = [[Piece(np.arange(i, i + 70), True, 1.0), Piece(np.arange(i, i + 59), True, 1.0)] for i in range(3)]


def test_a_model_gets_the_batch() -> None:
    batch = BatchLayout(seq_len=128).assemble(WINDOWS)
    inputs = model_inputs(batch, CPU)
    assert sorted(inputs) == ["positions", "targets", "tokens"]
    assert all(torch.equal(tensor, getattr(batch, name)) for name, tensor in inputs.items())


def test_packed_documents_come_with_their_boundaries_and_chunks() -> None:
    layout = BatchLayout(seq_len=128, document_mask=True, max_documents_per_sample=2)
    inputs = model_inputs(layout.assemble(WINDOWS), CPU)
    assert inputs["max_seqlen"] == 128
    assert inputs["cu_seqlens"].tolist() == [0, 70, 128, 198, 256, 326, 384]
    # documents of 70 and 58 tokens: two chunks of 64 and one; what is left over lies behind the first document
    chunks = [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [3, 0], [4, 0], [4, 1], [5, 0]]
    assert inputs["chunk_indices"].tolist() == chunks + [[0, 6]] * 3
