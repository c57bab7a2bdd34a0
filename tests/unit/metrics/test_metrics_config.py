from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from lt2titan.config.section import ConfigError
from lt2titan.metrics.config import MetricsConfig, ProfilingConfig


def test_defaults_are_valid() -> None:
    MetricsConfig().validate()
    ProfilingConfig().validate()


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (MetricsConfig(log_freq=0), "log_freq"),
        (MetricsConfig(save_tb_folder=""), "save_tb_folder"),
        (MetricsConfig(save_tb_folder="/somewhere/tb"), "save_tb_folder"),
        (MetricsConfig(save_tb_folder="../tb"), "save_tb_folder"),
        (MetricsConfig(enable_wandb=True, wandb_project=""), "wandb_project"),
        (ProfilingConfig(save_traces_folder=".."), "save_traces_folder"),
        (ProfilingConfig(profiler_active=0), "profiler_active"),
        (ProfilingConfig(profiler_warmup=-1), "profiler_warmup"),
        (ProfilingConfig(profile_freq=3), "profile_freq"),
    ],
)
def test_bad_value_is_refused_by_name(section: Any, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section.validate()
    assert caught.value.key == key


def test_the_shortest_profiling_cycle_is_allowed() -> None:
    ProfilingConfig(profile_freq=4, profiler_active=1, profiler_warmup=3).validate()


def test_config_imports_no_torch() -> None:
    code = "import sys, lt2titan.metrics.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
