"""Gated RMSNorm in plain PyTorch: y = x / rms(x) * weight * act(gate), in fp32 (fp64 for fp64 inputs)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm_reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """x and gate (..., D), weight (D,). Returns (..., D) in x's dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide, gate_wide = x.to(dtype), gate.to(dtype)
    normed = x_wide * torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
    opened = F.silu(gate_wide) if activation == "silu" else gate_wide.sigmoid()
    return (normed * weight.to(dtype) * opened).to(x.dtype)
