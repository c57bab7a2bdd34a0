"""From a checkpoint to a model that can be asked."""

from __future__ import annotations

from pathlib import Path

import torch

from lt2titan.checkpoint.convert import read_model_state
from lt2titan.config.job import JobConfig
from lt2titan.config.loader import from_toml
from lt2titan.config.section import ConfigError
from lt2titan.kernels.backend import resolve_backend
from lt2titan.model.init import build_on_meta
from lt2titan.model.lt2 import LT2


def pick_device(name: str) -> torch.device:
    """The GPU if there is one for "auto", else the device of that name ("cpu" or "cuda").

    Raises:
        ConfigError: there is no such device here.
    """
    has_gpu = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not has_gpu):
        raise ConfigError("--device", name, f"must be auto, cpu or cuda{'' if has_gpu else '; there is no GPU here'}")
    return torch.device("cuda" if name != "cpu" and has_gpu else "cpu")


def load_model(checkpoint: Path, device: torch.device, backend: str = "auto") -> tuple[LT2, JobConfig]:
    """The trained model on ``device`` (bf16 on a GPU, fp32 on a CPU) and the configuration it was trained with.

    Args:
        checkpoint: a step folder, a run folder (its newest valid checkpoint), or a converted file.
        backend: of the operators, as kernels.backend.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigFileError: it was written with a configuration that this version cannot read.
        ConfigError: the backend cannot run here.
    """
    weights, config_text = read_model_state(checkpoint, require_config=True)
    config = from_toml(config_text, origin=str(checkpoint))
    model = build_on_meta(config.model, resolve_backend(backend, device))
    model.load_state_dict(weights, assign=True)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval(), config
