"""How far from fp64 an operator may be."""

from __future__ import annotations

import torch

from lt2titan.kernels.check.case import Case

# Rounding to bf16 costs 2^-9 per value and to fp16 2^-11; fp32 products run on TF32 tensor cores on a GPU (2^-11) and
# are exact to 2^-24 on a CPU. A few such steps add up, most where a decay near 1 keeps everything: measured 8.2e-3 in
# bf16 and 4.4e-3 in fp32.
_GPU = {torch.bfloat16: 1e-2, torch.float16: 8e-3, torch.float32: 8e-3}
_CPU = {torch.bfloat16: 1e-2, torch.float16: 4e-3, torch.float32: 2e-5}
# fla computes the gradient of a decay per head as a difference of two larger sums: measured 1.8e-2 in bf16 for one
# token with an initial state, and, in TF32 where decays are near 0 and the gradient is all but nothing, 3.9e-2 (H200,
# Triton 3.7.1, fla 0.6.0). That of a decay per channel has no such difference and stays within the others' bounds.
_DECAY_PER_HEAD = 8e-2


def tolerance_of(case: Case, quantity: str, device: torch.device) -> float:
    """Largest relative error of ``quantity`` ("output", "final_state", "d<input>") in a case."""
    if device.type == "cpu":
        return _CPU[case.dtype]
    if quantity == "dg" and case.operator in ("gated_delta_rule", "simple_gla"):
        return _DECAY_PER_HEAD
    return _GPU[case.dtype]
