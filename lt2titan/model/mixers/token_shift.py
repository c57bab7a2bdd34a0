"""The token before: what RWKV mixes into every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_shift(x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give every token the one before it in its sequence. Reads no value on the host.

    Args:
        x: (B, L, D).
        state: (N, D), the token before each sequence's first; zeros when None. N is B or the number of documents.
        cu_seqlens: (N + 1,) boundaries of the documents packed in one row (then B is 1), some of which may be empty.

    Returns:
        (the shifted tokens (B, L, D), each sequence's last token (N, D): the state of what continues it. An empty
        document keeps its state).
    """
    if cu_seqlens is None:
        first = torch.zeros_like(x[:, :1]) if state is None else state.to(x.dtype).unsqueeze(1)
        return torch.cat([first, x[:, :-1]], dim=1), x[:, -1]
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    tokens = torch.arange(x.shape[1], device=x.device, dtype=cu_seqlens.dtype)
    # The number of documents that have ended: empty ones, which start where another does, are never chosen.
    document = torch.searchsorted(ends.contiguous(), tokens, right=True)
    is_first = (starts[document] == tokens).unsqueeze(-1)
    before = x.new_zeros(()) if state is None else state.to(x.dtype)[document]
    shifted = torch.where(is_first, before, F.pad(x[0, :-1], (0, 0, 1, 0)))
    kept = x.new_zeros(()) if state is None else state.to(x.dtype)
    last = torch.where((starts == ends).unsqueeze(-1), kept, x[0, (ends - 1).clamp(min=0)])
    return shifted.unsqueeze(0), last
