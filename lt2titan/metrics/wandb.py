"""Weights & Biases, online or offline (no network, no login); a resumed run continues the same W&B run."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lt2titan.metrics.record import Record, scalars

logger = logging.getLogger("lt2titan")

RUN_ID_FILE = "wandb_run_id.txt"


class WandbSink:
    """Logs ``train/<name>``, ``validation/<name>`` and ``<family>/<member>`` against the training step.

    The run's id stands in ``run_folder/wandb_run_id.txt``. A run that starts at step 0 gets a new id (or
    WANDB_RUN_ID), since W&B cannot take back the steps of an older one. For the same reason a resumed run shows
    re-done steps as they were first logged. After a crash that makes no difference worth mentioning; after going
    back with checkpoint.load_step it does: up to the old branch's last step W&B shows the old branch (the other
    sinks show the new one). Remove the file before going back, and the new branch becomes a W&B run of its own.
    """

    def __init__(
        self,
        run_folder: Path,
        project: str,
        run_name: str = "",
        resume_step: int = 0,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError(
                f"metrics.enable_wandb needs the wandb package ({error}): pip install wandb, or switch it off"
            ) from error
        run_folder.mkdir(parents=True, exist_ok=True)
        mode = _mode()
        try:
            self._run = wandb.init(
                project=project,
                name=run_name or run_folder.resolve().name,
                id=_run_id(run_folder / RUN_ID_FILE, resume_step),
                resume="allow",
                dir=str(run_folder),
                mode=mode,  # type: ignore[arg-type]  # any mode that WANDB_MODE may name
                config=dict(run_config or {}),
                allow_val_change=True,  # a resumed run may have more steps
            )
        except wandb.Error as error:
            raise RuntimeError(
                f"W&B did not start: {error}. Set WANDB_MODE=offline to record without a server, "
                "or metrics.enable_wandb = false"
            ) from error
        if mode == "offline":
            logger.info("W&B records offline; upload with: wandb sync %s/wandb/offline-run-*", run_folder)

    @property
    def run_id(self) -> str:
        return self._run.id

    def write(self, record: Record) -> None:
        # The training and the validation record of a step share one W&B step; the next step commits it.
        self._run.log(scalars(record), step=record.step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def _mode() -> str:
    """WANDB_MODE if it is set; else online with credentials and offline without (never a prompt)."""
    chosen = os.environ.get("WANDB_MODE", "")
    if chosen:
        return chosen
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _in_netrc():
        return "online"
    logger.warning(
        "W&B: no API key found, so this run is recorded offline (`wandb login` or WANDB_API_KEY to go online)"
    )
    return "offline"


def _in_netrc() -> bool:
    """Whether `wandb login` left a key for the server in the user's netrc file."""
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named = os.environ.get("NETRC")
    candidates = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in candidates:
        try:
            return netrc.netrc(path).authenticators(server) is not None
        except FileNotFoundError:
            continue
        except (netrc.NetrcParseError, OSError) as error:
            logger.warning("W&B: cannot read %s: %s", path, error)
    return False


def _run_id(path: Path, resume_step: int) -> str:
    if resume_step > 0 and path.exists():
        return path.read_text().strip()
    if resume_step > 0:
        logger.info("W&B: %s is missing, so steps from %d on go to a new W&B run", path, resume_step + 1)
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(run_id + "\n")
    os.replace(temporary, path)
    return run_id
