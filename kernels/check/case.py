"""One case of what is checked, and what is built of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lt2titan.kernels.check.recurrences import Decay, Sizes
from lt2titan.kernels.packing import make_chunk_indices

ONE_HEAD = Sizes(1, 1, 32, 32)
DOCUMENTS = (1, 64, 130, 7, 65, 1, 0, 0)


@dataclass(frozen=True)
class Case:
    """`documents` are lengths packed in one row; otherwise there are `batch` rows of `length` tokens."""

    operator: str
    dtype: torch.dtype
    what: str = ""
    """The shape's point, for the table."""
    sizes: Sizes = ONE_HEAD
    batch: int = 1
    length: int = 0
    documents: tuple[int, ...] = ()
    decay: Decay = "mixed"
    state: bool = False
    """With initial and final state."""
    decode: bool = False
    """Without gradients, one token after another."""
    host_chunks: bool = True
    """Pass chunk_indices made on the host, as the data loader does."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the operators that are not recurrences."""

    @property
    def name(self) -> str:
        """Operator, dtype and shape in one line."""
        return f"{self.operator}, {self.dtype_name}, {self.what}, {self.shape}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape(self) -> str:
        """Tokens, then heads and widths."""
        tokens = "+".join(map(str, self.documents)) if self.documents else f"{self.batch}x{self.length}"
        sizes = (self.sizes._asdict() if self.sizes != ONE_HEAD or not self.options else {}) | self.options
        return " ".join([tokens, *(f"{key}={value}" for key, value in sizes.items())])


@dataclass(frozen=True)
class Built:
    """Named inputs, and two functions from them to the same outputs: the operator and its definition."""

    inputs: dict[str, Tensor]
    run: Callable[[dict[str, Tensor]], Sequence[Tensor]]
    define: Callable[[dict[str, Tensor]], Sequence[Tensor]]
    names: tuple[str, ...] = ("output", "final_state")
    """Of the outputs; of fewer, the first."""


class Packing:
    """Rows, tokens, sequences, and the boundaries if documents are packed."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.cu_seqlens: Tensor | None = None
        self.chunk_indices: Tensor | None = None
        self.batch, self.length, self.n_sequences = case.batch, case.length, case.batch
        self.max_seqlen = case.length
        if case.documents:
            bounds = torch.tensor([0, *accumulate(case.documents)], dtype=torch.int32)
            self.batch, self.length, self.n_sequences = 1, int(bounds[-1]), len(case.documents)
            self.max_seqlen = max(case.documents)
            self.cu_seqlens = bounds.to(device)
            if case.host_chunks:
                self.chunk_indices = make_chunk_indices(bounds).to(device)
