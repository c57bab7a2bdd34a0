"""Where the compute dtype is not enough."""

from __future__ import annotations

import torch
from torch import Tensor


def precise(x: Tensor) -> Tensor:
    """x in fp32 at least, fp64 as it is: for decays, which multiply over thousands of tokens, and sums of exponentials,
    which no bf16 survives."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
