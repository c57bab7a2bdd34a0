"""Section ``[checkpoint]``: when checkpoints are written, how many stay, and where a run starts from."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.config.section import require


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints and resuming."""

    enable: bool = True
    """Write checkpoints, and resume from the newest valid one that the folder holds."""

    folder: str = "checkpoint"
    """Where the step-N folders lie, relative to job.dump_folder (or absolute)."""

    interval: int = 500
    """Steps between checkpoints; one more is written at the end of the run."""

    keep_latest_k: int = 10
    """How many checkpoints to keep; 0 keeps all. Old ones are removed only after a newer one is complete."""

    load_step: int = -1
    """Go back to this step; -1 for the newest valid one. The first save then renames newer steps to
    abandoned-step-N (not used, counted or removed any more) and notes the step in branch.json: started again
    with the same load_step, the run continues from its newest checkpoint. Remove branch.json to go back again."""

    initial_load_path: str = ""
    """Warm start: a step folder, or a run folder (its newest valid step), to load when this run has no
    checkpoint of its own; "" for none."""

    initial_load_model_only: bool = True
    """Take only the weights from initial_load_path; false also takes optimizer, step, data position and
    random states."""

    verify_checksums: bool = True
    """Compare the CRC32 of every tensor before loading it: reads the files twice, shared among the ranks."""

    def validate(self) -> None:
        """Raise ConfigError on a value that cannot be used."""
        require(bool(self.folder), self, "folder", 'must name a folder, e.g. "checkpoint"')
        require(self.interval >= 1, self, "interval", "must be at least 1 (enable = false turns saving off)")
        require(self.keep_latest_k >= 0, self, "keep_latest_k", "must be 0 (keep all) or more")
        require(self.load_step >= -1, self, "load_step", "must be a step, or -1 for the newest valid one")
        require(self.enable or self.load_step == -1, self, "load_step", "needs checkpoint.enable = true")
