"""Where a run comes from: versions and commit, kept with its resolved configuration."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import lt2titan
from lt2titan.config.job import JobConfig
from lt2titan.config.loader import to_toml

_PACKAGES = ("torch", "triton", "flash-linear-attention", "datasets", "tokenizers")


def resolved_toml(config: JobConfig) -> str:
    """The whole configuration as TOML that reproduces the run, under comments that say what ran it."""
    return to_toml(config, header=[f"lt2titan {lt2titan.__version__}, commit {commit()}", versions()])


def versions() -> str:
    """Python and the packages that decide what is computed, in one line."""
    found = [f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def commit() -> str:
    """The commit that this code was checked out from, "-dirty" when tracked files differ; "unknown" outside git."""
    folder = Path(lt2titan.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
