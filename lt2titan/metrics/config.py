"""What a run records about itself ([metrics]) and what it traces ([profiling]). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from lt2titan.config.section import require


def _require_folder_inside_run(section: Any, field: str) -> None:
    folder = PurePath(getattr(section, field))
    inside = folder.parts and not folder.is_absolute() and ".." not in folder.parts
    require(bool(inside), section, field, "must name a folder inside the run folder, such as 'tb' or 'logs/tb'")


@dataclass(kw_only=True, slots=True)
class MetricsConfig:
    """`metrics.jsonl` and the console line are always written; TensorBoard and W&B are switched on here."""

    log_freq: int = 10
    """Steps between two log records; the first and the last step of a run are logged too."""

    loop_diagnostics: bool = True
    """Record what each loop does: size and change of the residual stream, gradient norms inside and outside of the
    loop with every record, exit losses and attention sinks with every validation. Well under 1 % of the time."""

    enable_tensorboard: bool = False
    """Write TensorBoard event files into `save_tb_folder`."""

    save_tb_folder: str = "tb"
    """Folder of the TensorBoard event files, inside the run folder; a resumed run continues in it."""

    enable_wandb: bool = False
    """Log to Weights & Biases; offline when WANDB_MODE=offline or when there is no API key. W&B cannot replace
    logged steps: before going back with checkpoint.load_step, remove wandb_run_id.txt to get a new W&B run."""

    wandb_project: str = "lt2titan"
    """W&B project; the entity is taken from WANDB_ENTITY."""

    wandb_run_name: str = ""
    """W&B display name of the run; "" takes the name of the run folder."""

    disable_color_printing: bool = False
    """Print console lines without colour (also when NO_COLOR is set or the output is not a terminal)."""

    def validate(self) -> None:
        require(self.log_freq >= 1, self, "log_freq", "must be at least 1")
        _require_folder_inside_run(self, "save_tb_folder")
        require(
            bool(self.wandb_project) or not self.enable_wandb,
            self,
            "wandb_project",
            "must name a project when metrics.enable_wandb is set",
        )


@dataclass(kw_only=True, slots=True)
class ProfilingConfig:
    """torch.profiler traces of chosen steps; open them in https://ui.perfetto.dev or chrome://tracing.
    See docs/profiling.md."""

    enable_profiling: bool = False
    """Write a trace per rank every `profile_freq` steps, and beside it a summary of where the time went."""

    save_traces_folder: str = "profile_traces"
    """Folder of the traces, inside the run folder: iteration_N/rankR_trace.json.gz; N is the step traced."""

    profile_freq: int = 10
    """Steps from one trace to the next; each trace ends at a multiple of it."""

    profiler_active: int = 1
    """Consecutive steps in one trace."""

    profiler_warmup: int = 3
    """Steps before a trace in which the profiler runs but keeps nothing: its start-up cost stays out."""

    enable_memory_snapshot: bool = False
    """Write what CUDA memory holds and where it was allocated, every `profile_freq` steps and when memory runs out;
    open it in https://pytorch.org/memory_viz. Not on CPU."""

    save_memory_snapshot_folder: str = "memory_snapshots"
    """Folder of the snapshots, inside the run folder: iteration_N/rankR_memory_snapshot.pickle."""

    memory_snapshot_max_entries: int = 100000
    """Allocations and frees that a snapshot looks back on; more take more host memory."""

    def validate(self) -> None:
        _require_folder_inside_run(self, "save_traces_folder")
        _require_folder_inside_run(self, "save_memory_snapshot_folder")
        require(self.memory_snapshot_max_entries >= 1, self, "memory_snapshot_max_entries", "must be at least 1")
        require(self.profiler_active >= 1, self, "profiler_active", "must be at least 1")
        require(self.profiler_warmup >= 0, self, "profiler_warmup", "must not be negative")
        needed = self.profiler_active + self.profiler_warmup
        require(
            self.profile_freq >= needed,
            self,
            "profile_freq",
            f"must be at least profiler_active + profiler_warmup = {needed}",
        )
