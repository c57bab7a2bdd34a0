"""Nothing in a checkpoint is unpickled: crafted files are refused and their code never runs."""

from __future__ import annotations

import os
import pickle
import random
from enum import Enum
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_helpers import build, manager_of, save, train
from torch.distributed.checkpoint import FileSystemReader

from lt2titan.checkpoint.folders import find_bad_checksum, find_problem, resolve_checkpoint
from lt2titan.checkpoint.storage import (
    CheckpointError,
    SafeReader,
    empty_stored,
    json_to_tensor,
    read_metadata,
    read_tensors,
    stored_tensors,
    tensor_to_json,
)


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def step_folder(tmp_path: Path) -> Path:
    model, optimizer = build(0)
    train(model, optimizer, 1)
    return save(manager_of(tmp_path / "run"), 1, model, optimizer)


@pytest.fixture
def forged(step_folder: Path) -> Path:
    """As whoever forges metadata would leave it: without the checksum."""
    (step_folder / ".metadata.crc32").unlink()
    return step_folder


@pytest.mark.parametrize("value", [{"a": [1, 0.1, None, True, "é", {}]}, {"loss": float("inf")}, [], 2**70, 1e-320])
def test_json_survives(value):
    assert tensor_to_json(json_to_tensor(value, "x")) == value


@pytest.mark.parametrize("value", [{1: 2}, {"a": (1,)}, [b"x"], {"a": [{"b": {3}}]}, torch.tensor(1)])
def test_what_json_would_change_is_refused(value):
    with pytest.raises(ValueError, match="the data position cannot be stored"):
        json_to_tensor(value, "the data position")


def test_metadata_is_what_dcp_reads(step_folder):
    ours, theirs = read_metadata(step_folder), FileSystemReader(step_folder).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


def test_every_dtype_of_tensors_is_readable(tmp_path):
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint8]
    tensors = {f"t{i}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    dcp.save(dict(tensors), checkpoint_id=tmp_path / "s")
    entries = stored_tensors(read_metadata(tmp_path / "s"))
    loaded = {key: empty_stored(entry) for key, entry in entries.items()}
    read_tensors(loaded, SafeReader(tmp_path / "s"))
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key].view(torch.uint8), tensor.view(torch.uint8))


def test_code_in_metadata_does_not_run(forged, tmp_path):
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists(), "the payload must work"
    marker.unlink()
    (forged / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(CheckpointError, match=r"refers to .*, which a checkpoint of lt2titan never does"):
        read_metadata(forged)
    model, optimizer = build(0)
    with pytest.raises(CheckpointError, match="none is valid"):
        manager_of(tmp_path / "run").restore(model=model, optimizer=optimizer)
    assert not marker.exists()


class _GetattrEnums(pickle.Pickler):
    """Pickles enum members as the first releases of Python 3.11 do."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_enum_members_as_older_pythons_pickle_them(forged, tmp_path):
    metadata = FileSystemReader(forged).read_metadata()
    with (forged / ".metadata").open("wb") as file:
        _GetattrEnums(file).dump(metadata)
    assert b"getattr" in (forged / ".metadata").read_bytes()
    assert read_metadata(forged).state_dict_metadata == metadata.state_dict_metadata
    marker = tmp_path / "executed"
    (forged / ".metadata").write_bytes(  # getattr(Path(marker), "touch")()
        b"cpathlib\nPosixPath\n(V"
        + str(marker).encode()
        + b"\ntR0cbuiltins\ngetattr\n(cpathlib\nPosixPath\n(V"
        + str(marker).encode()
        + b"\ntRVtouch\ntR)R."
    )
    with pytest.raises(CheckpointError, match="damaged or refused"):
        read_metadata(forged)
    pickle.loads((forged / ".metadata").read_bytes())
    assert marker.exists(), "the payload must work"


def test_metadata_of_single_ranks_is_not_a_way_in(step_folder, tmp_path):
    """DCP falls back to ``__0.metadata`` when ``.metadata`` cannot be read."""
    marker = tmp_path / "executed"
    tensors = {"model.rho": torch.empty(4, 8)}
    (step_folder / ".metadata").unlink()
    (step_folder / "__0.metadata").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(CheckpointError, match=r"has no \.metadata"):
        read_tensors(tensors, SafeReader(step_folder))
    assert not marker.exists()


def test_pickled_values_in_shards_are_refused(tmp_path):
    marker = tmp_path / "executed"
    dcp.save({"header": torch.zeros(2), "model.rho": Evil(marker)}, checkpoint_id=tmp_path / "step-1")
    assert not marker.exists()
    with pytest.raises(CheckpointError, match=r"refers to .*BytesStorageMetadata"):
        read_tensors({"model.rho": torch.empty(2)}, SafeReader(tmp_path / "step-1"))
    with pytest.raises(CheckpointError, match="BytesStorageMetadata"):
        resolve_checkpoint(tmp_path / "step-1")
    assert not marker.exists()


def test_storage_outside_the_folder_is_refused(forged):
    metadata = FileSystemReader(forged).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = "../step-1/__0_0.distcp"
    (forged / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "does not name a file of the folder" in str(find_problem(forged))


def test_every_byte_of_the_metadata_is_covered_by_a_checksum(step_folder):
    sound = (step_folder / ".metadata").read_bytes()
    for at in range(0, len(sound), 7):
        content = bytearray(sound)
        content[at] ^= 1
        (step_folder / ".metadata").write_bytes(content)
        assert "wrong checksum" in str(find_problem(step_folder))
    (step_folder / ".metadata").write_bytes(sound)
    (step_folder / ".metadata.crc32").unlink()  # a kill between the two files leaves a valid checkpoint
    assert find_problem(step_folder) is None


def test_every_byte_of_the_weights_is_covered_by_checksums(step_folder):
    shard = step_folder / "__0_0.distcp"
    sound = shard.read_bytes()
    model, optimizer = build(0)
    train(model, optimizer, 1)
    raw = model.blocks[1].weight.detach().numpy().tobytes()
    start = sound.index(raw)
    assert find_bad_checksum(step_folder) == ""
    for at in range(start, start + len(raw), 17):
        content = bytearray(sound)
        content[at] ^= 0x10
        shard.write_bytes(content)
        assert "model.blocks.1.weight" in find_bad_checksum(step_folder)
        parts = [find_bad_checksum(step_folder, "", part, 3) for part in range(3)]
        assert len([problem for problem in parts if problem]) == 1
        assert find_bad_checksum(step_folder, "optimizer.") == ""


def test_damaged_bytes_anywhere_never_raise_anything_but_our_error(forged):
    """Seeded damage to metadata and shard: found, or harmless, but never another exception."""
    generator = random.Random(0)
    for name in (".metadata", "__0_0.distcp"):
        sound = (forged / name).read_bytes()
        for _ in range(300):
            content = bytearray(sound)
            for _ in range(generator.choice([1, 4])):
                content[generator.randrange(len(content))] = generator.randrange(256)
            (forged / name).write_bytes(content)
            if find_problem(forged) is None:
                find_bad_checksum(forged)
        (forged / name).write_bytes(sound)
    assert find_problem(forged) is None


def test_resolve_checkpoint(step_folder, tmp_path):
    run = tmp_path / "run"
    for path in (step_folder, str(run), run / "checkpoint"):
        assert resolve_checkpoint(path) == step_folder
    (run / "checkpoint" / "step-2").mkdir()
    assert resolve_checkpoint(run) == step_folder
    with pytest.raises(CheckpointError, match="incomplete"):
        resolve_checkpoint(run / "checkpoint" / "step-2")
    os.rename(step_folder, tmp_path / "elsewhere")  # a step folder may have any name
    assert resolve_checkpoint(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    with pytest.raises(CheckpointError, match="nothing but interrupted saves: step-2"):
        resolve_checkpoint(run)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        resolve_checkpoint(tmp_path / "nowhere")
