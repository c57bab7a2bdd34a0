from __future__ import annotations

import subprocess
import sys

import pytest

from lt2titan.checkpoint.config import CheckpointConfig
from lt2titan.config.section import ConfigError


def test_defaults_are_valid_and_follow_torchtitan():
    config = CheckpointConfig()
    config.validate()
    assert (config.folder, config.interval, config.keep_latest_k, config.load_step) == ("checkpoint", 500, 10, -1)
    CheckpointConfig(keep_latest_k=0).validate()
    CheckpointConfig(keep_latest_k=1, load_step=0).validate()


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("folder", {"folder": ""}),
        ("interval", {"interval": 0}),
        ("keep_latest_k", {"keep_latest_k": -1}),
        ("load_step", {"load_step": -2}),
        ("load_step", {"load_step": 5, "enable": False}),
    ],
)
def test_bad_values_name_their_key(key, values):
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        CheckpointConfig(**values).validate()


def test_the_section_imports_without_torch():
    code = "import sys; import lt2titan.checkpoint.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
