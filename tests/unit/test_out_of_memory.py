"""A run that does not fit says what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lt2titan.config.job import JobConfig
from lt2titan.config.loader import load_config
from lt2titan.out_of_memory import DeviceMemoryError, explained

TINY = Path(__file__).parents[1] / "assets" / "tiny.toml"
SETTINGS = r"Microbatches of 2 x 32 tokens on each rank .* activation_checkpoint.mode = 'nested': lower "


@pytest.fixture
def config() -> JobConfig:
    return load_config(TINY, ["--training.local_batch_size", "0", "--activation_checkpoint.mode", "nested"], 1)


def test_memory_of_the_host_runs_out(config: JobConfig) -> None:
    with (
        pytest.raises(DeviceMemoryError, match=r"tried to allocate 1125899906842624 bytes.*\. " + SETTINGS),
        explained(config, 2),
    ):
        torch.empty(2**50, dtype=torch.uint8)


def test_memory_of_a_gpu_runs_out(config: JobConfig) -> None:
    """In torch 2.11's words."""
    words = (
        "CUDA out of memory. Tried to allocate 2.75 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1.35 GiB is "
        "free. Including non-PyTorch memory, this process has 138.44 GiB memory in use."
    )
    with pytest.raises(DeviceMemoryError) as raised, explained(config, 2):
        raise torch.OutOfMemoryError(words)
    text = str(raised.value)
    assert (
        text.startswith("CUDA out of memory. Tried to allocate 2.75 GiB. GPU 0 has")
        and "1.35 GiB is free. Microbatches" in text
    )
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_stay_what_they_are(config: JobConfig) -> None:
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2") as raised, explained(config, 2):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert type(raised.value) is RuntimeError
