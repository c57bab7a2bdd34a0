"""Model weights to and from one file: DCP step folder <-> torch file (.pt) or safetensors, tensor by tensor.

Needs no model: names, shapes and dtypes come from the files. The run's configuration (TOML text) travels
along, so that the model's shape can be read back: in the header of a DCP folder, under ``config`` in a
torch file, in the metadata of safetensors.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from lt2titan.checkpoint import folders, storage
from lt2titan.checkpoint.storage import HEADER_KEY, MODEL_PREFIX, CheckpointError, CheckpointWriteError
from lt2titan.version import __version__

TORCH_SUFFIXES = (".pt", ".pth")
SAFETENSORS_SUFFIX = ".safetensors"
CONFIG_METADATA_KEY = "lt2titan.config"  # in safetensors, whose metadata is text -> text
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
Tensors = dict[str, torch.Tensor]


def read_model_state(path: str | Path, *, require_config: bool = False) -> tuple[Tensors, str]:
    """The weights (on CPU) and the configuration text of a step, checkpoint or run folder, or of a file.

    Nothing is unpickled but tensors, checksums of DCP folders are compared. The text is "" if a file carries
    none. Raises CheckpointError when it cannot be read, or carries none although ``require_config``.
    """
    path = Path(path)
    tensors, config_text = _read(path)
    if require_config and not config_text:
        raise CheckpointError(
            f"{path} holds weights without the configuration of the model: name the run folder, or a file that "
            "scripts/convert_checkpoint.py made from it"
        )
    return tensors, config_text


def _read(path: Path) -> tuple[Tensors, str]:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_dir():
        return _read_folder(folders.resolve_checkpoint(path))
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    if path.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(path)
    raise CheckpointError(_unknown_suffix(path))


def write_model_state(path: str | Path, tensors: Tensors, config_text: str) -> None:
    """Write weights and configuration to ``path``: .pt, .safetensors, or (no suffix) a weights-only step
    folder.

    An interrupted write leaves no file under that name (a folder: one without metadata). Raises
    CheckpointError if ``path`` exists, CheckpointWriteError if it cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path} exists: remove it or choose another name")
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if not _is_file(path):
        _write_folder(path, tensors, config_text)
        return
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == SAFETENSORS_SUFFIX:
            safetensors.torch.save_file(tensors, partial, metadata={"format": "pt", CONFIG_METADATA_KEY: config_text})
        else:
            torch.save({"model": tensors, "config": config_text}, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointWriteError(f"{path} could not be written: {error}") from error


def convert(source: str | Path, target: str | Path, export_dtype: str = "") -> tuple[int, int]:
    """Convert the weights of ``source`` to ``target``; returns (number of tensors, number of elements).

    Bitwise, unless ``export_dtype`` (a key of DTYPES) names another dtype for the floating-point tensors.
    """
    _is_file(Path(target))  # refuse a bad name before reading gigabytes
    if Path(target).exists():
        raise CheckpointError(f"{target} exists: remove it or choose another name")
    tensors, config_text = read_model_state(source)
    if export_dtype:
        dtype = DTYPES[export_dtype]
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    write_model_state(target, tensors, config_text)
    return len(tensors), sum(tensor.numel() for tensor in tensors.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of scripts/convert_checkpoint.py; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description="Convert model weights between a DCP checkpoint folder, one torch file and safetensors, "
        "bitwise. The direction follows from the names. The run's configuration travels along; optimizer and "
        "data position do not.",
    )
    parser.add_argument(
        "source",
        help="a step folder, a run folder (its newest valid step), a .pt/.pth file or a .safetensors file",
    )
    parser.add_argument(
        "target",
        help="what to write: NAME.pt, NAME.pth or NAME.safetensors; without a suffix a weights-only checkpoint "
        "folder, for checkpoint.initial_load_path and scripts/generate.py. Must not exist",
    )
    parser.add_argument(
        "--export_dtype",
        "--export-dtype",
        choices=sorted(DTYPES),
        default="",
        help="convert floating-point tensors to this dtype (default: as stored). The result is then no longer "
        "bitwise the checkpoint",
    )
    options = parser.parse_args(arguments)
    try:
        n_tensors, n_elements = convert(options.source, options.target, options.export_dtype)
    except CheckpointError as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 2
    how = f"converted to {options.export_dtype}, not bitwise" if options.export_dtype else "bitwise"
    print(f"{options.target}: {n_tensors} tensors, {n_elements:,} elements ({how})")
    return 0


# --- formats --------------------------------------------------------------------------------------


def _read_folder(step_folder: Path) -> tuple[Tensors, str]:
    reader = storage.SafeReader(step_folder)
    entries = storage.stored_tensors(reader.read_metadata())
    if damage := folders.find_bad_checksum(step_folder, MODEL_PREFIX):
        raise CheckpointError(f"{step_folder}: {damage}")
    wanted = {
        key: storage.empty_stored(entry)
        for key, entry in entries.items()
        if key.startswith(MODEL_PREFIX) or key == HEADER_KEY
    }
    storage.read_tensors(wanted, reader, no_dist=True)
    header = storage.tensor_to_json(wanted.pop(HEADER_KEY))
    return {key.removeprefix(MODEL_PREFIX): tensor for key, tensor in wanted.items()}, header["config"]


def _write_folder(path: Path, tensors: Tensors, config_text: str) -> None:
    header = {
        "format": storage.FORMAT_VERSION,
        "model_only": True,
        "lt2titan": __version__,
        "torch": str(torch.__version__),
        "config": config_text,
    }
    state = {MODEL_PREFIX + name: tensor for name, tensor in tensors.items()}
    state[HEADER_KEY] = storage.json_to_tensor(header, "the configuration")
    try:
        folders.prepare_step(path, config_text)
        storage.write_tensors(state, path, no_dist=True)
    except (OSError, CheckpointWriteError) as error:
        if path.exists():
            folders.remove_step(path)
        raise CheckpointWriteError(f"{path} could not be written: {error}") from error


def _read_torch(path: Path) -> tuple[Tensors, str]:
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and text, and is not unpickled: {error}") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    model = content.get("model") if isinstance(content, dict) else None
    config_text = content.get("config", "") if isinstance(content, dict) else ""
    if not isinstance(model, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in model.values()):
        raise CheckpointError(f'{path} holds no tensors under "model": not written by this script')
    return model, config_text if isinstance(config_text, str) else ""


def _read_safetensors(path: Path) -> tuple[Tensors, str]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            config_text = (file.metadata() or {}).get(CONFIG_METADATA_KEY, "")
            return {name: file.get_tensor(name) for name in names}, config_text
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _is_file(path: Path) -> bool:
    """True for a name of a file format, False for a folder; raises CheckpointError for another suffix."""
    if path.suffix in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        return True
    if path.suffix[1:2].isalpha():  # but lt2_1.3b is a folder
        raise CheckpointError(_unknown_suffix(path))
    return False


def _unknown_suffix(path: Path) -> str:
    known = ", ".join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))
    return f"{path}: {path.suffix or 'a file without suffix'} is not one of {known}, or a checkpoint folder"
