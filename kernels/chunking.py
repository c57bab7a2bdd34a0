"""Cutting sequences into chunks, for the plain PyTorch references of the recurrences.

Inside a chunk a recurrence is a few products between its tokens; from chunk to chunk only the state passes. Chunks are
ordered step by step, like a packed sequence of an RNN: the first chunk of every sequence, then the second of those that
have one, and so on, with the sequences sorted from long to short.

Shapes: B batch, L tokens, H heads, D width, N sequences (B, or the number of packed documents), M chunks in all,
C tokens per chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.packing import check_cu_seqlens
from lt2titan.kernels.recurrence import Reference

TokenLoop = Callable[..., tuple[Tensor, Tensor]]

RECURRENT_MAX_LENGTH = 4
"""Up to here the token loop launches fewer operations than the chunked form."""


class ChunkLayout:
    """Where tokens go when every sequence is cut into chunks, the last of each padded with zeros.

    Args:
        x: any per-token tensor (B, L, ...).
        cu_seqlens: document boundaries, or None for B sequences of L tokens.
        size: largest number of tokens in a chunk (fewer if every sequence is shorter).
    """

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, size: int) -> None:
        self.batch, self.length = x.shape[:2]
        if cu_seqlens is None:
            self.n_sequences = self.batch
            self.size = min(size, self.length)
            self.n_active = [self.batch] * (-(-self.length // self.size))
            self._order: Tensor | None = None
        else:
            self._pack(check_cu_seqlens(cu_seqlens, self.length), size, x.device)

    def _pack(self, bounds: list[int], size: int, device: torch.device) -> None:
        starts, ends = torch.tensor(bounds[:-1]), torch.tensor(bounds[1:])
        lengths = ends - starts
        self.n_sequences = len(bounds) - 1
        self.size = min(size, max(int(lengths.max()), 1))
        order = lengths.argsort(descending=True, stable=True)
        counts = (lengths[order] + self.size - 1) // self.size
        self.n_active = [int((counts > j).sum()) for j in range(int(counts[0]))]
        first = torch.cat([starts[order[:n]] + j * self.size for j, n in enumerate(self.n_active)])
        last = torch.cat([ends[order[:n]] for n in self.n_active])
        token = first[:, None] + torch.arange(self.size)
        used = token < last[:, None]
        token = torch.where(used, token, self.length)  # row `length` is the zero token
        slots = used.flatten().nonzero().squeeze(1)
        slot_of_token = torch.empty(self.length, dtype=torch.long)
        slot_of_token[token.flatten()[slots]] = slots
        self._order = order.to(device)
        self._token = token.flatten().to(device)
        self._slot_of_token = slot_of_token.to(device)

    def to_chunks(self, x: Tensor) -> Tensor:
        """(B, L, H, D) -> (M, H, C, D)."""
        if self._order is None:
            n_chunks = len(self.n_active)
            x = F.pad(x, (0, 0, 0, 0, 0, n_chunks * self.size - self.length)).unflatten(1, (n_chunks, self.size))
            return x.permute(1, 0, 3, 2, 4).flatten(0, 1).contiguous()
        rows = F.pad(x[0], (0, 0, 0, 0, 0, 1)).index_select(0, self._token)
        return rows.unflatten(0, (-1, self.size)).transpose(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """(M, H, C, D) -> (B, L, H, D)."""
        if self._order is None:
            x = x.unflatten(0, (-1, self.batch)).permute(1, 0, 3, 2, 4)
            return x.flatten(1, 2)[:, : self.length]
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self._slot_of_token).unsqueeze(0)

    def scan(self, state: Tensor, step: Callable[[slice, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Pass the states (N, H, K, V) from chunk to chunk.

        ``step(rows, state)`` returns the states after the chunks ``rows`` that start from ``state``.
        Returns the state that every chunk starts from (M, H, K, V) and the final states (N, H, K, V).
        """
        if self._order is not None:
            state = state.index_select(0, self._order)
        ended, state = [state[self.n_active[0] :]], state[: self.n_active[0]]  # empty documents end where they start
        before: list[Tensor] = []
        first = 0
        for n_chunks, n_next in pairwise([*self.n_active, 0]):
            before.append(state)
            state = step(slice(first, first + n_chunks), state)
            first += n_chunks
            ended.append(state[n_next:])
            state = state[:n_next]
        final = torch.cat(ended[::-1])
        return torch.cat(before), final if self._order is None else final.index_select(0, self._order.argsort())


def each_document(
    token_loop: TokenLoop,
    tensors: tuple[Tensor, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence that knows no packing, ``token_loop(*tensors, state, scale)``, on one document after another."""
    outputs, finals = [], []
    for n, (start, end) in enumerate(pairwise(check_cu_seqlens(cu_seqlens, tensors[0].shape[1]))):
        state = None if initial_state is None else initial_state[n : n + 1]
        o, final = token_loop(*(x[:, start:end] for x in tensors), state, scale)
        outputs.append(o)
        finals.append(final)
    return torch.cat(outputs, dim=1), torch.cat(finals)


def reference_of(token_loop: TokenLoop, chunked: TokenLoop) -> Reference:
    """A recurrence's reference: in chunks, or token by token where that launches fewer operations.

    Both take the per-token tensors, the initial state, and then ``token_loop`` the scale, ``chunked`` the boundaries of
    documents and the scale.
    """

    def reference(
        inputs: Sequence[Tensor], initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        if cu_seqlens is None and inputs[0].shape[1] <= RECURRENT_MAX_LENGTH:
            return token_loop(*inputs, initial_state, scale)
        return chunked(*inputs, initial_state, cu_seqlens, scale)

    return reference


def first_state(initial_state: Tensor | None, n_sequences: int, k: Tensor, v: Tensor) -> Tensor:
    """``initial_state`` in v's dtype, or zeros (N, HV, K, V)."""
    if initial_state is not None:
        return initial_state.to(v.dtype)
    return v.new_zeros(n_sequences, v.shape[2], k.shape[-1], v.shape[-1])


def causal(size: int, device: torch.device, *, strict: bool = False) -> Tensor:
    """(C, C) booleans: token t (row) may see token i (column), i <= t, or i < t if strict."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(-1 if strict else 0)


def decay_ratios(total: Tensor) -> Tensor:
    """exp(G_t - G_i) for i <= t and 0 elsewhere, (..., C, C, K), from the running sums G (..., C, K) of log-decays.

    A difference of two sums is never positive, whatever their size: nothing overflows.
    """
    later = ~causal(total.shape[-2], total.device).unsqueeze(-1)
    return (total.unsqueeze(-2) - total.unsqueeze(-3)).masked_fill(later, -torch.inf).exp()
