"""Going back with ``checkpoint.load_step``: setting the old branch aside, and remembering that it was done.

Both happen right before the first save of the new branch, and in this order: what is newer is renamed to
``abandoned-step-N``, newest first, then ``branch.json`` is written. So at whatever moment a kill comes, nothing
is lost, and once the file names a step, everything newer than that step is of the new branch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from lt2titan.checkpoint.folders import list_steps
from lt2titan.checkpoint.storage import METADATA_FILE, CheckpointError

BRANCH_FILE = "branch.json"


def read_branch(folder: Path) -> int | None:
    """The step that the run in ``folder`` last went back to, None if it never did. Raises CheckpointError."""
    path = folder / BRANCH_FILE
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["load_step"]
        if not isinstance(step, int):
            raise TypeError(f"load_step is {step!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Remove it to go back to checkpoint.load_step (once more), or leave "
            "out checkpoint.load_step to continue from the newest checkpoint"
        ) from error
    return step


def start_branch(folder: Path, load_step: int) -> list[Path]:
    """Set aside the complete checkpoints after ``load_step`` and record the step; returns their new places."""
    moved = []
    for step, path in list_steps(folder):
        if step > load_step and (path / METADATA_FILE).exists():
            target = _free_name(folder / f"abandoned-{path.name}")
            os.rename(path, target)
            moved.append(target)
    partial = folder / f"{BRANCH_FILE}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"load_step": load_step}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / BRANCH_FILE)
    return moved


def _free_name(path: Path) -> Path:
    """``path``, or with .1, .2, ... behind it if an earlier going back left one of that name."""
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate
