"""What can be said about the text of a run before anything starts. Importable without torch, numpy and pyarrow."""

from __future__ import annotations

from pathlib import Path

from lt2titan.config.section import ConfigError
from lt2titan.data.config import DataConfig, dataset_error
from lt2titan.data.errors import DataError
from lt2titan.data.find import find_files, find_shards

Text = tuple[str, str]  # (dataset, dataset_path)


def validation_text(training: Text, dataset: str, dataset_path: str) -> Text:
    """What ``validation.dataset`` and ``validation.dataset_path`` mean: "" is training's.

    A path belongs to its kind of dataset, so another kind does not take over training's path.
    """
    same_kind = dataset in ("", training[0])
    return dataset or training[0], dataset_path or (training[1] if same_kind else "")


def shared_files(a: Text, b: Text) -> list[Path]:
    """Local files that both settings read."""
    meanings = [_meaning(*text) for text in (a, b)]
    return sorted(set.intersection(*(set(m) if isinstance(m, list) else set() for m in meanings)))


def is_same_text(a: Text, b: Text) -> bool:
    """Whether two settings mean the same documents, however they are spelled (``folder``, ``./folder/*.jsonl``).

    Raises:
        DataError: a path that differs matches no file.
    """
    return a == b or _meaning(*a) == _meaning(*b)


def _meaning(dataset: str, dataset_path: str) -> object:
    if dataset == "python_docs":
        return dataset  # its path is not used
    if dataset == "synthetic":
        return dataset, int(dataset_path) if dataset_path.isdecimal() else dataset_path or 0
    return (find_files(dataset_path) if dataset == "files" else find_shards(dataset_path)) or (dataset, dataset_path)


def check_source(data: DataConfig, dataset: str, dataset_path: str, section: str) -> None:
    """Refuse what cannot be read as the text of ``section`` ("training" or "validation").

    Raises:
        ConfigError: with the whole key, such as "training.dataset_path": an unknown dataset, a path that is missing or
            matches no file, streaming of what cannot be streamed.
    """
    problem = dataset_error(dataset, dataset_path)
    if problem is not None:
        problem.key = f"{section}.{problem.key}"
        raise problem
    if section == "training" and data.streaming and dataset != "huggingface":
        raise ConfigError("data.streaming", True, f"only {section}.dataset = 'huggingface' streams, not {dataset!r}")
    try:
        if dataset == "files":
            find_files(dataset_path)
        elif dataset == "huggingface":
            find_shards(dataset_path)
    except DataError as error:
        raise ConfigError(f"{section}.dataset_path", dataset_path, str(error)) from error


def check_texts(data: DataConfig, training: Text, validation: Text | None) -> None:
    """``check_source`` for both texts, and for how they go together.

    Args:
        validation: as ``validation_text`` gives it; None: no validation.
    Raises:
        ConfigError: with the whole key.
    """
    check_source(data, *training, "training")
    if validation is None:
        return
    if validation != training:
        check_source(data, *validation, "validation")
    same = is_same_text(training, validation)
    if data.holdout_documents == 0 and (same or (data.streaming and validation[0] == "huggingface")):
        source = "is held out of training" if same else "is the beginning of a stream"
        reason = f"leaves nothing to validate on, since validation text {source}: raise it, set validation.dataset and "
        raise ConfigError("data.holdout_documents", 0, f"{reason}validation.dataset_path, or validation.no_enable")
