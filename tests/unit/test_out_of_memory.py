"""A run that does not fit says what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lt2titan.config.job import JobConfig
from lt2titan.config.loader import load_config
from lt2titan.out_of_memory import DeviceMemoryError, explained

TINY = Path(__file__).parents[1] / "assets" / "tiny.toml"
SETTINGS = r"each rank has microbatches of 2 x 32 tokens .* activation_checkpoint.mode = 'nested'; lower training"


@pytest.fixture
def config() -> JobConfig:
    """Four sequences, of which two ranks have two each."""
    return load_config(TINY, ["--training.local_batch_size", "0", "--activation_checkpoint.mode", "nested"], 2)


def test_memory_of_the_host_runs_out(config: JobConfig) -> None:
    expected = r"tried to allocate 1125899906842624 bytes.*\nThe run does not fit: " + SETTINGS
    with pytest.raises(DeviceMemoryError, match=expected), explained(config, 2):
        torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.75 GiB. ... try setting PYTORCH_ALLOC_CONF"),
        RuntimeError("CUDA error: out of memory"),  # in a library, or a context that does not fit
    ],
)
def test_memory_of_a_gpu_runs_out(error: RuntimeError, config: JobConfig) -> None:
    with pytest.raises(DeviceMemoryError, match=SETTINGS) as raised, explained(config, 2):
        raise error
    assert str(raised.value).startswith(f"{error}\n")
    assert raised.value.__cause__ is error


def test_other_errors_stay_what_they_are(config: JobConfig) -> None:
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2") as raised, explained(config, 2):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert type(raised.value) is RuntimeError
