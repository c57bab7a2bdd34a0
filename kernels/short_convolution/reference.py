"""Short causal depthwise convolution in plain PyTorch.

    y_t = act(bias + sum_j weight[:, W - 1 - j] * x_{t - j}),  j = 0 .. W - 1

where x before the start of a sequence is its initial state (zeros by default). A few shifted products: as fast on a CPU
as a grouped conv1d, and without its transpositions. Computed in fp32, or in fp64 for fp64 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.packing import check_cu_seqlens


def short_convolution_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """x (B, L, D), weight (D, W), initial_state (N, D, W - 1). Returns (y in x's dtype, final state in x's dtype).

    Every sequence is preceded by the W - 1 rows of its state, so that no row reaches into its neighbour.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    B, L, D = x.shape
    history = weight.shape[1] - 1
    if cu_seqlens is None:
        first = x.new_zeros(B, D, history) if initial_state is None else initial_state.to(x.dtype)
        extended = torch.cat([first.mT, x], dim=1)  # (B, W - 1 + L, D)
        y = _shifted_products(extended.to(dtype), weight.to(dtype), bias, activation)
        return y.to(x.dtype), extended[:, L:].mT

    bounds = torch.tensor(check_cu_seqlens(cu_seqlens, L))
    n_documents = bounds.numel() - 1
    first = x.new_zeros(n_documents, D, history) if initial_state is None else initial_state.to(x.dtype)
    document = torch.repeat_interleave(torch.arange(n_documents), bounds.diff())
    # A token moves right by the history rows of the documents up to its own; what is left belongs to the history.
    of_token = torch.arange(L) + (document + 1) * history
    of_history = (bounds[:-1] + torch.arange(n_documents) * history)[:, None] + torch.arange(history)
    source = torch.empty(L + n_documents * history, dtype=torch.long)
    source[of_history.flatten()] = torch.arange(n_documents * history)
    source[of_token] = torch.arange(L) + n_documents * history
    extended = torch.cat([first.mT.flatten(0, 1), x[0]]).index_select(0, source.to(x.device))
    y = _shifted_products(extended.to(dtype)[None], weight.to(dtype), bias, activation)
    y = y.index_select(1, (of_token - history).to(x.device))
    ends = (of_history + bounds.diff()[:, None]).flatten().to(x.device)
    final_state = extended.index_select(0, ends).unflatten(0, (n_documents, history)).mT
    return y.to(x.dtype), final_state


def _shifted_products(extended: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """(B, W - 1 + L, D) -> (B, L, D)."""
    width = weight.shape[1]
    length = extended.shape[1] - width + 1
    y = extended[:, :length] * weight[:, 0]
    for j in range(1, width):
        y = torch.addcmul(y, extended[:, j : j + length], weight[:, j])
    if bias is not None:
        y = y + bias.to(y.dtype)
    return F.silu(y) if activation == "silu" else y
