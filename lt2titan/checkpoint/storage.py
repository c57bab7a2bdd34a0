"""Tensors and JSON in torch.distributed.checkpoint (DCP) folders, read without unpickling.

Every value in a checkpoint is a tensor; text and numbers travel as JSON in uint8 tensors, because DCP would
pickle them. DCP's ``.metadata`` is itself a pickle: it is read with an unpickler that knows only the few
classes that describe tensors.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

METADATA_FILE = ".metadata"
METADATA_CHECKSUM_FILE = ".metadata.crc32"  # eight hexadecimal digits, written right after .metadata
HEADER_KEY = "header"  # JSON: format, step, world size, counters, configuration, data position shared by all
MODEL_PREFIX = "model."
FORMAT_VERSION = 1


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or does not fit; the message names the folder and the way out."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written (full disk, permissions, ...). Earlier ones are untouched."""


# --- JSON in tensors ------------------------------------------------------------------------------


def json_to_tensor(value: Any, what: str) -> torch.Tensor:
    """``value`` as JSON text in a uint8 tensor. Raises ValueError if it would come back changed."""
    if found := _not_json(value):
        raise ValueError(f"{what} cannot be stored in a checkpoint: {found} would not survive JSON")
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def tensor_to_json(tensor: torch.Tensor) -> Any:
    """The value that ``json_to_tensor`` stored."""
    return json.loads(tensor.numpy().tobytes().decode())


def _not_json(value: Any) -> str:
    """The first part of ``value`` that JSON refuses or changes (tuples, keys that are no strings), or ""."""
    if isinstance(value, dict):
        bad_keys = (f"the key {key!r}" for key in value if not isinstance(key, str))
        return next(bad_keys, "") or next(filter(None, map(_not_json, value.values())), "")
    if isinstance(value, list):
        return next(filter(None, map(_not_json, value)), "")
    return "" if value is None or isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"


# --- metadata without trusting it -----------------------------------------------------------------

# BytesStorageMetadata is left out on purpose: it announces a pickled object, which DCP would unpickle.
_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    (cls.__module__, cls.__name__): cls
    for cls in (
        Metadata,
        MetadataIndex,
        TensorStorageMetadata,
        dcp_metadata.TensorProperties,
        dcp_metadata.ChunkStorageMetadata,
        dcp_metadata.StorageMeta,
        dcp_metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
        torch.Size,
    )
}


def _memory_format(enum: type, member: str) -> dcp_metadata._MEM_FORMAT_ENCODING:
    """The one use of getattr that a pickle of DCP metadata may have."""
    if enum is not dcp_metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it refers to an attribute of {enum!r}")
    return dcp_metadata._MEM_FORMAT_ENCODING[member]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES:
            return _METADATA_CLASSES[module, name]
        if (module, name) == ("torch.serialization", "_get_layout"):
            return {"torch.strided": torch.strided}.__getitem__
        if (module, name) == ("builtins", "getattr"):  # so Python 3.11 pickled enum members at first
            return _memory_format
        if module.split(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePosixPath  # where it was saved; pathlib's inner names differ between Python versions
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(
            f"it refers to {module}.{name}, which a checkpoint of lt2titan never does: written by something "
            "else, or tampered with"
        )


# What pickle says it may raise on damaged input, and what _check_types meets in wrong types.
_DAMAGED: tuple[type[Exception], ...] = (pickle.UnpicklingError, EOFError, ImportError, MemoryError)
_DAMAGED += (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def read_metadata(step_folder: Path) -> Metadata:
    """The DCP metadata of a step folder, read by a restricted unpickler.

    Raises CheckpointError when it is missing, damaged, or refers to anything but tensors.
    """
    path, checksum_file = step_folder / METADATA_FILE, step_folder / METADATA_CHECKSUM_FILE
    try:
        content = path.read_bytes()
        if checksum_file.exists() and checksum_file.read_bytes() != _checksum(content):
            raise CheckpointError(f"{path} is damaged: wrong checksum")
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        _check_types(metadata)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{step_folder} is not a checkpoint: it has no {METADATA_FILE}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except _DAMAGED as error:
        raise CheckpointError(f"{path} is damaged or refused: {type(error).__name__}: {error}") from error
    return metadata


def _checksum(content: bytes) -> bytes:
    return f"{zlib.crc32(content):08x}".encode()


def _check_types(metadata: Any) -> None:
    """The unpickler limits the classes; this makes sure that they stand where DCP expects them."""
    if not isinstance(metadata, Metadata):
        raise TypeError(f"it holds {type(metadata).__name__}, not DCP metadata")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(entry, TensorStorageMetadata):
            raise TypeError(f"entry {key!r} is not a tensor")
        if not isinstance(entry.properties.dtype, torch.dtype) or not isinstance(entry.size, torch.Size):
            raise TypeError(f"entry {key!r} has no dtype or size")
        for chunk in entry.chunks:
            if MetadataIndex(key, chunk.offsets) not in metadata.storage_data:
                raise ValueError(f"a part of {key!r} has no place in the files")
    for info in metadata.storage_data.values():
        if not isinstance(info, _StorageInfo) or Path(info.relative_path).name != info.relative_path:
            raise TypeError("a storage entry does not name a file of the folder")
        if info.offset < 0 or info.length < 0 or info.transform_descriptors:
            raise ValueError(f"the storage entry of {info.relative_path} makes no sense")


def stored_tensors(metadata: Metadata, prefix: str = "") -> dict[str, TensorStorageMetadata]:
    """The entries whose name starts with ``prefix``."""
    return {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def empty_stored(entry: TensorStorageMetadata) -> torch.Tensor:
    """A CPU tensor of the stored size and dtype."""
    return torch.empty(entry.size, dtype=entry.properties.dtype)


# --- reading and writing --------------------------------------------------------------------------


class SafeReader(FileSystemReader):
    """DCP's reader with the metadata from ``read_metadata``; DCP reads shards with ``weights_only=True``."""

    def __init__(self, step_folder: Path) -> None:
        super().__init__(step_folder)
        self.step_folder = step_folder
        self._metadata: Metadata | None = None

    # With a parameter named `kwargs` DCP would fall back to the metadata of single ranks: hence `options`.
    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """The metadata of the folder, read once."""
        if self._metadata is None:
            self._metadata = read_metadata(self.step_folder)
        return self._metadata


class _Writer(FileSystemWriter):
    """DCP's writer; a failed write surfaces as its OSError, not as the zip writer's complaint about it."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from error

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)
        folder = Path(self.path)
        (folder / METADATA_CHECKSUM_FILE).write_bytes(_checksum((folder / METADATA_FILE).read_bytes()))


@contextmanager
def _dcp_errors(error_class: type[CheckpointError], what: str) -> Iterator[None]:
    """Turn DCP's exception (a BaseException, one cause per failing rank) into ours; drop a useless
    warning.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            causes = [
                f"rank {rank}: {str(cause) or type(cause).__name__}" for rank, (cause, _) in error.failures.items()
            ]
            raise error_class(f"{what}: {'; '.join(causes)}") from error


def write_tensors(
    state: dict[str, torch.Tensor],
    step_folder: Path,
    group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Write tensors and DTensors into an empty or new step folder; keys may differ between ranks.

    Raises CheckpointWriteError on all ranks when any of them fails.
    """
    # One thread, because DCP loses the exceptions of the others.
    writer = _Writer(step_folder, thread_count=1)
    with _dcp_errors(CheckpointWriteError, f"{step_folder} could not be written"):
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=no_dist or _is_alone())


def read_tensors(
    state: dict[str, torch.Tensor],
    reader: SafeReader,
    group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Fill the tensors and DTensors of ``state`` in place, in their own layout; keys may differ between
    ranks.

    Raises CheckpointError on all ranks when any of them fails.
    """
    reader.read_metadata()  # here, because DCP hides why it failed (torch 2.11)
    with _dcp_errors(CheckpointError, f"{reader.step_folder} could not be read"):
        dcp.load(state, storage_reader=reader, process_group=group, no_dist=no_dist or _is_alone())


def _is_alone() -> bool:
    """Whether there is nobody to plan with. DCP would still send its plan through gloo, whose worker threads then start
    OpenMP teams of their own, and libgomp stops spinning for good: training on two CPU cores became 2.6 times slower
    after the first save (torch 2.13).
    """
    return not dist.is_initialized() or dist.get_world_size() == 1
