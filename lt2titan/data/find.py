"""Which local files a dataset path means. Imports neither torch nor pyarrow, to check a path before a run starts."""

from __future__ import annotations

import glob
from pathlib import Path

from lt2titan.data.errors import DataError

TEXT, JSON_LINES, PARQUET = (".txt", ".md"), (".jsonl", ".ndjson", ".json"), (".parquet",)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUPPORTED = f"{', '.join((*TEXT, *JSON_LINES, *PARQUET))}, each also with {', '.join(COMPRESSED)}"


def kind(path: Path) -> str:
    """The suffix that says what is in ``path``, without the one of a compression; "" if it is not supported."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    suffix = name.suffix.lower()
    return suffix if suffix in (*TEXT, *JSON_LINES, *PARQUET) else ""


def find_files(dataset_path: str) -> list[Path]:
    """Files that a path means: a file, a folder (searched to the bottom), a glob pattern, or a
    comma-separated list.

    Returns: absolute paths, sorted, each once.
    Raises: DataError if a part matches nothing, or names a file of an unsupported kind.
    """
    parts = [dataset_path] if Path(dataset_path).expanduser().exists() else dataset_path.split(",")
    found: set[Path] = set()
    for part in filter(None, (part.strip() for part in parts)):
        path = Path(part).expanduser()
        if path.is_dir():
            matches = [p for p in path.rglob("*") if p.is_file() and kind(p)]
        else:
            names = [str(path)] if path.is_file() else glob.glob(str(path), recursive=True)
            matches = [p for p in map(Path, names) if p.is_file()]
        if not matches:
            raise DataError(f"no files match {part!r} (from {Path.cwd()}); supported are {SUPPORTED}")
        unsupported = [p for p in matches if not kind(p)]
        if unsupported:
            raise DataError(f"{unsupported[0]}: not a supported kind of file; supported are {SUPPORTED}")
        found.update(p.resolve() for p in matches)
    if not found:
        raise DataError(
            "dataset_path is empty: give a file, a folder, a glob pattern or a comma-separated list of them"
        )
    return sorted(found)


def find_shards(dataset_path: str) -> list[Path]:
    """Local files that the path of a Hugging Face dataset means; none if it is the name of a dataset of the hub.

    Raises: DataError as ``find_files``, and for anything but one kind of rows: a downloaded dataset may well hold
        a README.md, which is no document.
    """
    looks_local = any(c in dataset_path for c in "*?,") or dataset_path.startswith(("/", ".", "~"))
    if not looks_local and not Path(dataset_path).exists():
        return []
    paths = find_files(dataset_path)
    kinds = {kind(path) for path in paths}
    if len(kinds) > 1 or kinds & set(TEXT):
        raise DataError(
            f"{dataset_path}: 'huggingface' reads local files of one kind, parquet or JSON lines, and found "
            f"{', '.join(sorted(kinds))}; name one kind or use training.dataset = 'files'"
        )
    return paths
