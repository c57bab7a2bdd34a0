"""Step folders on disk: which there are, which are valid, and how they are removed.

``step-N`` holds DCP's shards, ``config.toml`` for the reader's eye, and ``.metadata``, which DCP writes
last: a folder without it is an interrupted save.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lt2titan.checkpoint.storage import HEADER_KEY, METADATA_FILE, CheckpointError, read_metadata

CONFIG_FILE = "config.toml"


@dataclass(frozen=True)
class Problem:
    """Why a step folder cannot be loaded; ``incomplete`` for an interrupted save, as opposed to damage."""

    reason: str
    incomplete: bool = False

    def __str__(self) -> str:
        return self.reason


def find_problem(step_folder: Path) -> Problem | None:
    """None for a valid step folder: metadata that parses, and every file that it names, long enough."""
    if not step_folder.is_dir():
        return Problem("no such folder")
    if not (step_folder / METADATA_FILE).exists():
        return Problem(f"incomplete: no {METADATA_FILE} (an interrupted save)", incomplete=True)
    try:
        metadata = read_metadata(step_folder)
    except CheckpointError as error:
        return Problem(str(error))
    needed: dict[str, int] = {}
    for info in metadata.storage_data.values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in sorted(needed.items()):
        file = step_folder / name
        if not file.is_file():
            return Problem(f"{name} is missing")
        if file.stat().st_size < size:
            return Problem(f"{name} is truncated: {file.stat().st_size} of {size} bytes")
    if HEADER_KEY not in metadata.state_dict_metadata:
        return Problem("it has no header: not written by lt2titan")
    return None


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named step-N in ``folder``, newest first."""
    if not folder.is_dir():
        return []
    matches = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def newest_valid(folder: Path, known_bad: dict[Path, Problem] | None = None) -> tuple[Path | None, dict[Path, Problem]]:
    """The newest valid step folder in ``folder``, and the newer ones passed over, with the reason.

    (None, ...) when there is nothing but interrupted saves. Raises CheckpointError when there are checkpoints
    but all are damaged: starting over in silence would throw the run away.
    """
    passed_over: dict[Path, Problem] = {}
    for _, path in list_steps(folder):
        problem = (known_bad or {}).get(path) or find_problem(path)
        if problem is None:
            return path, passed_over
        passed_over[path] = problem
    if any(not problem.incomplete for problem in passed_over.values()):
        reasons = "; ".join(f"{path.name}: {problem}" for path, problem in passed_over.items())
        raise CheckpointError(
            f"{folder} holds checkpoints but none is valid ({reasons}). Restore one, or move the folder away "
            "to start over"
        )
    return None, passed_over


def resolve_checkpoint(path: str | Path) -> Path:
    """The step folder that ``path`` means: itself, or the newest valid step of a checkpoint or run folder.

    A run folder keeps its steps in ``checkpoint/``; where ``checkpoint.folder`` was changed, name that
    folder. Raises CheckpointError when there is no valid step.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: name a step folder or a run folder")
    if (path / METADATA_FILE).exists() or re.fullmatch(r"step-\d+", path.name):
        if problem := find_problem(path):
            raise CheckpointError(f"{path} cannot be used: {problem}")
        return path
    for folder in (path, path / "checkpoint"):
        if list_steps(folder):
            step_folder, passed_over = newest_valid(folder)
            if step_folder is None:
                names = ", ".join(bad.name for bad in passed_over)
                raise CheckpointError(f"{folder} holds nothing but interrupted saves: {names}")
            return step_folder
    raise CheckpointError(f"{path} holds no checkpoint: no step-N folder in it, nor in {path / 'checkpoint'}")


def prepare_step(step_folder: Path, config_text: str) -> None:
    """An empty step folder but for the readable configuration; whatever has that name is replaced."""
    if step_folder.exists():
        remove_step(step_folder)
    step_folder.mkdir(parents=True)
    with (step_folder / CONFIG_FILE).open("w", encoding="utf-8") as file:
        file.write(config_text)
        file.flush()
        os.fsync(file.fileno())


def remove_step(step_folder: Path) -> None:
    """Remove a step folder so that an interruption leaves an incomplete one, never one that looks valid."""
    (step_folder / METADATA_FILE).unlink(missing_ok=True)
    shutil.rmtree(step_folder)


# --- checksums ------------------------------------------------------------------------------------


def find_bad_checksum(step_folder: Path, prefix: str = "", part: int = 0, parts: int = 1) -> str:
    """Which tensor is damaged among those whose name starts with ``prefix`` (and the header); "" if none.

    DCP stores a tensor with torch.save: a zip archive with a CRC32 per record, which torch.load does not
    compare. Costs one more pass over the bytes. ``part`` of ``parts`` looks at its share only (one per
    rank).
    """
    storage = read_metadata(step_folder).storage_data
    entries = sorted(
        (info.relative_path, info.offset, info.length, index.fqn)
        for index, info in storage.items()
        if index.fqn.startswith(prefix) or index.fqn == HEADER_KEY
    )
    for name, offset, length, key in entries[part::parts]:
        try:
            with (step_folder / name).open("rb") as file:
                record = _Window(file, offset, length)
                damage = zipfile.ZipFile(record).testzip()  # type: ignore[arg-type]
        except (zipfile.BadZipFile, struct.error, OSError, EOFError, ValueError, RuntimeError) as error:
            damage = str(error) or type(error).__name__
        if damage:
            return f"wrong checksum: {key} in {name} ({damage})"
    return ""


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.position)]
        self.file.seek(self.start + self.position)
        count = self.file.readinto(view)
        self.position += count
        return count
