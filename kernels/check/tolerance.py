"""How far from fp64 an operator may be."""

from __future__ import annotations

import torch

from lt2titan.kernels.check.cases import Case

# Rounding to bf16 costs 2^-9 per value and to fp16 2^-11; fp32 products run on TF32 tensor cores on a GPU (2^-11) and
# are exact to 2^-24 on a CPU. A few such steps add up.
_GPU = {torch.bfloat16: 1e-2, torch.float16: 4e-3, torch.float32: 3e-3}
_CPU = {torch.bfloat16: 1e-2, torch.float16: 4e-3, torch.float32: 2e-5}
# fla computes the decay's gradient as a difference of two larger sums: measured 1.9e-2 to 3e-2 in bf16 (H200, Triton
# 3.7.1), more where it acts through the initial state alone.
_DECAY = {torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float32: 3e-3}
_ONE_TOKEN_DECAY = 0.1


def tolerance_of(case: Case, quantity: str, device: torch.device) -> float:
    """Largest relative error of ``quantity`` ("output", "final_state", "d<input>") in a case."""
    if device.type == "cpu":
        return _CPU[case.dtype]
    if quantity == "dg":
        return _ONE_TOKEN_DECAY if case.length == 1 else _DECAY[case.dtype]
    return _GPU[case.dtype]
