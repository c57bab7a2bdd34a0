"""TensorBoard event files that continue after a resume."""

from __future__ import annotations

import math
from pathlib import Path

from lt2titan.metrics.record import Record, scalars


class TensorBoardSink:
    """Scalars ``train/<name>``, ``validation/<name>`` and ``<family>/<member>`` in ``folder``.

    The events of steps after ``resume_step`` are marked as superseded, so that readers show every step once.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError(
                f"metrics.enable_tensorboard needs the tensorboard package ({error}): "
                "pip install tensorboard, or switch it off"
            ) from error
        # `purge_step` hides the steps from it on in older files of the folder; all of them for a fresh start.
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def write(self, record: Record) -> None:
        for tag, value in scalars(record).items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(tag, value, record.step, walltime=record.time)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()
