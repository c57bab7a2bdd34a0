"""Trading compute for activation memory."""

from __future__ import annotations

import logging

from lt2titan.model.lt2 import LT2

logger = logging.getLogger("lt2titan")


def apply_activation_checkpoint(model: LT2, mode: str) -> None:
    """ "none" keeps every activation; "block" keeps each block's input in each loop and computes the rest again."""
    model.core.recompute_blocks = mode == "block"
    logger.info("activation checkpointing: %s", mode)
