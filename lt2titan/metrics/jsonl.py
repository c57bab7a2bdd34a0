"""`metrics.jsonl`: one JSON object per line, readable while the run goes on and after any crash."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path

from lt2titan.metrics.record import Record

logger = logging.getLogger("lt2titan")


class MetricsWriteError(RuntimeError):
    """A metrics file could not be written (a full disk, a quota)."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"cannot write {path}: {error.strerror}. Free space there (or raise the quota) and start the run "
            f"again: it resumes from its newest checkpoint."
        )


class JsonlSink:
    """Appends records to ``path``, each line on its way to the file system before ``write`` returns.

    A run that resumes at step N re-does the steps after N, so their old lines are dropped first, as is a line
    that a kill tore. A run that starts at step 0 starts an empty file and keeps that of an earlier run as
    ``<path>.1`` (.2, ... if taken). Non-finite numbers are written as null because JSON has no NaN.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and resume_step > 0:
            _drop_lines_after(path, resume_step)
        elif path.exists() and path.stat().st_size > 0:
            _set_aside(path)
        # Unbuffered: nothing can be left behind in this process, and a full disk is noticed at its line.
        self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        values = {key: _finite(value) for key, value in record.values().items()}
        line = memoryview((json.dumps(values, allow_nan=False) + "\n").encode())
        try:
            while line:  # a raw file may take only a part
                line = line[self._file.write(line) :]
        except OSError as error:
            raise MetricsWriteError(self.path, error) from error

    def close(self, failed: bool) -> None:
        self._file.close()


def _finite(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None


def _step_of(line: bytes) -> int | None:
    """The step of a complete line; None when the line cannot be read."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


def _set_aside(path: Path) -> None:
    """Rename the file of an earlier run to the next free number."""
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    try:
        os.rename(path, kept)
    except OSError as error:
        raise MetricsWriteError(kept, error) from error
    logger.warning("%s is of an earlier run and this one starts from step 0: kept as %s", path, kept)


def _drop_lines_after(path: Path, resume_step: int) -> None:
    """Keep the lines up to ``resume_step``, replacing the file in one move."""
    lines = path.read_bytes().splitlines()
    kept: list[bytes] = []
    unreadable: list[int] = []
    for number, line in enumerate(lines, start=1):
        step = _step_of(line)
        if step is None:
            unreadable.append(number)
        elif step <= resume_step:
            kept.append(line)

    if unreadable:
        logger.warning("%s: dropped unreadable lines %s (a kill while writing tears one)", path, unreadable)
    if len(kept) + len(unreadable) < len(lines):
        dropped = len(lines) - len(kept) - len(unreadable)
        logger.info("%s: dropped %d lines after step %d, which this run continues from", path, dropped, resume_step)

    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(line + b"\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MetricsWriteError(temporary, error) from error
    os.replace(temporary, path)
