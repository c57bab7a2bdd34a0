"""The configuration of a measured run. Known before torch is imported, so that mistakes end a benchmark at once."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from lt2titan.config.job import JobConfig
from lt2titan.config.loader import load_config_or_exit

PROFILED_STEPS = 4
"""At the end of a run that is profiled: the profiler's warm-up and the step that it keeps, which it slows down."""


def measured_recipe(
    recipe: str, overrides: list[str], *, n_warm_up: int, n_steps: int, is_profiled: bool, folder: str
) -> JobConfig:
    """The recipe on random tokens, without validation, checkpoints and diagnostics; every step is logged.

    Raises:
        SystemExit: it is not valid, or ``overrides`` change what a measurement sets itself.
    """
    n_all = n_warm_up + n_steps
    options = {
        "training.dataset": "synthetic",
        "training.dataset_path": "",
        "training.steps": n_all,
        "lr_scheduler.warmup_steps": n_all,
        "metrics.log_freq": 1,
        "job.dump_folder": folder,
    }
    switches = ["data.no_streaming", "checkpoint.no_enable", "validation.no_enable"]
    switches += ["metrics.no_enable_tensorboard", "metrics.no_loop_diagnostics"]
    switches.append("profiling.enable_profiling" if is_profiled else "profiling.no_enable_profiling")
    if is_profiled:
        options |= {"profiling.profile_freq": n_all, "profiling.profiler_warmup": PROFILED_STEPS - 1}
        options |= {"profiling.profiler_active": 1}
    own = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    own += [f"--{name}" for name in switches]
    config = load_config_or_exit(recipe, [*own, *overrides], 1)
    measured = asdict(load_config_or_exit(recipe, [*overrides, *own], 1))
    for section, values in asdict(config).items():
        for key, value in values.items():
            if value != measured[section][key]:
                sys.exit(
                    f"{Path(sys.argv[0]).stem}: --{section}.{key} {value}: leave it out, a measurement sets it itself "
                    f"({measured[section][key]!r}; steps by --warm-up and --steps)"
                )
    return config
