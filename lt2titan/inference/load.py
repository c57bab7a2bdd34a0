"""From a checkpoint to a model that can be asked."""

from __future__ import annotations

from pathlib import Path

import torch

from lt2titan.checkpoint.convert import read_model_state
from lt2titan.config.job import JobConfig
from lt2titan.config.loader import from_toml
from lt2titan.kernels.backend import resolve_backend
from lt2titan.model.init import build_on_meta
from lt2titan.model.lt2 import LT2


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one; anything else is torch's name of a device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_model(checkpoint: Path, device: torch.device) -> tuple[LT2, JobConfig]:
    """The trained model on ``device`` (bf16 on a GPU, fp32 on a CPU) and the configuration it was trained with.

    Args:
        checkpoint: a step folder, a run folder (its newest valid checkpoint), or a converted file.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    weights, config_text = read_model_state(checkpoint)
    config = from_toml(config_text, origin=str(checkpoint))
    model = build_on_meta(config.model, resolve_backend("auto", device))
    model.load_state_dict(weights, assign=True)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval(), config
