"""AdamW over two parameter groups."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from lt2titan.optim.config import OptimizerConfig

logger = logging.getLogger("lt2titan")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101) that decays matrices and leaves alone what `is_decayed` refuses."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[is_decayed(name, parameter)].append(parameter)
    logger.info("AdamW: weight decay on %d tensors, none on %d", len(groups[True]), len(groups[False]))
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Matrices are; norms, A_log and dt_bias (vectors), rho and the embedding are not."""
    return parameter.ndim >= 2 and name not in ("core.rho", "embedding.weight")
