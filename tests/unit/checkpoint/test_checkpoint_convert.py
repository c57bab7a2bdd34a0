from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import CONFIG_TEXT, assert_same, build, manager_of, save, train
from safetensors.torch import load_file, save_file

from lt2titan.checkpoint.convert import convert, main, read_model_state, write_model_state
from lt2titan.checkpoint.storage import CheckpointError, CheckpointWriteError

SCRIPT = Path(__file__).parents[3] / "scripts" / "convert_checkpoint.py"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    model, optimizer = build(0)
    manager = manager_of(tmp_path / "run")
    for step in (1, 2):
        train(model, optimizer, 1)
        save(manager, step, model, optimizer)
    return tmp_path / "run"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """The weights that ``run_folder`` holds at step 2."""
    model, optimizer = build(0)
    train(model, optimizer, 2)
    return dict(model.state_dict())


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "lt2_1.3b"])
def test_round_trip_is_bitwise_and_warm_starts(run_folder, weights, tmp_path, name):
    exported, back = tmp_path / "out" / name, tmp_path / "out" / "back"
    assert convert(run_folder, exported) == (len(weights), sum(t.numel() for t in weights.values()))
    convert(exported, back)
    for path in (run_folder / "checkpoint" / "step-2", exported, back):
        tensors, config_text = read_model_state(path)
        assert config_text == CONFIG_TEXT
        assert_same(tensors, weights)
    assert (back / "config.toml").read_text(encoding="utf-8") == CONFIG_TEXT

    model, optimizer = build(5)
    loaded = manager_of(tmp_path / "new", initial_load_path=str(back)).restore(model=model, optimizer=optimizer)
    assert loaded.config_text == CONFIG_TEXT
    assert_same(dict(model.state_dict()), weights)
    with pytest.raises(CheckpointError, match="holds weights only"):
        manager_of(tmp_path / "new", initial_load_path=str(back), initial_load_model_only=False).restore(
            model=model, optimizer=optimizer
        )


def test_files_are_what_their_libraries_read(run_folder, weights, tmp_path):
    convert(run_folder, tmp_path / "a.pt")
    convert(run_folder, tmp_path / "a.safetensors")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["config"] == CONFIG_TEXT
    assert_same(content["model"], weights)
    assert_same(load_file(tmp_path / "a.safetensors"), weights)


def test_special_values_and_dtypes_survive_bitwise(tmp_path):
    tensors = {
        "nan": torch.tensor([0x7FC00001, -1, 0x7F800000, 1], dtype=torch.int32).view(torch.float32),
        "bf16": torch.tensor([-0.0, 1e-40, float("-inf")], dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "empty": torch.empty(0, 4),
    }
    write_model_state(tmp_path / "start", tensors, "")
    for source, target in (("start", "a.pt"), ("a.pt", "b.safetensors"), ("b.safetensors", "end")):
        convert(tmp_path / source, tmp_path / target)
    loaded, config_text = read_model_state(tmp_path / "end")
    assert config_text == ""
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (loaded[name], tensor))
        assert torch.equal(left, right)


def test_export_dtype(run_folder, weights, tmp_path):
    convert(run_folder, tmp_path / "a.safetensors", "bf16")
    assert_same(load_file(tmp_path / "a.safetensors"), {name: tensor.bfloat16() for name, tensor in weights.items()})


def test_command_line(run_folder, weights, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), str(run_folder), str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(weights)} tensors" in done.stdout
    assert "(bitwise)" in done.stdout
    assert_same(read_model_state(tmp_path / "a.safetensors")[0], weights)


def test_refusals(run_folder, tmp_path, capsys):
    (tmp_path / "exists.pt").touch()
    (tmp_path / "pickle.pt").touch()
    torch.save({"model": {"w": Path("x")}}, tmp_path / "pickle.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.safetensors").write_text("not safetensors")
    (tmp_path / "text.pt").write_text("not torch")
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for source, target, reason in (
        (run_folder, "exists.pt", "exists: remove it"),
        (run_folder, "a.bin", ".bin is not one of"),
        (run_folder / "nowhere", "a.pt", "does not exist"),
        (tmp_path / "pickle.pt", "a", "holds more than tensors"),
        (tmp_path / "list.pt", "a", 'holds no tensors under "model"'),
        (tmp_path / "text.safetensors", "a", "cannot be read"),
        (tmp_path / "text.pt", "a", "cannot be read"),
    ):
        assert main([str(source), str(tmp_path / target)]) == 2
        message = capsys.readouterr().err
        assert reason in message, message
        assert "Traceback" not in message
        assert not (tmp_path / "a").exists()
    assert read_model_state(tmp_path / "foreign.safetensors")[1] == ""
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors holds weights without the configuration.*name"):
        read_model_state(tmp_path / "foreign.safetensors", require_config=True)
    assert read_model_state(run_folder, require_config=True)[1] == CONFIG_TEXT


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a"])
def test_a_file_that_cannot_grow_leaves_nothing(tmp_path, name):
    tensors = {"w": torch.zeros(300_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointWriteError, match="could not be written"):
            write_model_state(tmp_path / name, tensors, CONFIG_TEXT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
