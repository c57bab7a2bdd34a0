from __future__ import annotations

import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_helpers import (
    CONFIG_TEXT,
    Net,
    all_tensors,
    assert_same,
    build,
    manager_of,
    save,
    train,
)

from lt2titan.checkpoint import storage
from lt2titan.checkpoint.folders import find_problem, list_steps
from lt2titan.checkpoint.storage import CheckpointError, CheckpointWriteError


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in list_steps(folder / "checkpoint")]


def log_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def three_steps(tmp_path: Path) -> Path:
    """A run folder with valid steps 1, 2 and 3."""
    manager = manager_of(tmp_path)
    model, optimizer = build(0)
    for step in (1, 2, 3):
        train(model, optimizer, 1)
        save(manager, step, model, optimizer)
    return tmp_path


# --- resume ---------------------------------------------------------------------------------------


def test_straight_run_equals_run_resume_resume(tmp_path):
    model, optimizer = build(0)
    random.seed(1)
    np.random.seed(1)
    straight, truth = [], []
    for step in (1, 2, 3):
        straight += train(model, optimizer, 2)
        truth.append((random.random(), np.random.rand(), np.random.randn()))
        if step < 3:
            save(manager_of(tmp_path), step, model, optimizer)
            os.rename(tmp_path / "checkpoint" / f"step-{step}", tmp_path / f"step-{step}")
    expected = all_tensors(model, optimizer)

    (tmp_path / "checkpoint" / "step-1").parent.mkdir(exist_ok=True)
    os.rename(tmp_path / "step-1", tmp_path / "checkpoint" / "step-1")
    resumed = straight[:2]
    for step in (1, 2):
        model, optimizer = build(seed=50 + step)  # other weights, an optimizer that never stepped
        random.seed(99)
        np.random.seed(99)
        loaded = manager_of(tmp_path).restore(model=model, optimizer=optimizer)
        assert loaded is not None
        assert loaded.step == step
        assert loaded.train_state == {"tokens_seen": 20 * step, "loss_sum": 0.1 * step}
        assert loaded.data_state == {"index": step, "fingerprint": "abc"}
        assert loaded.config_text == CONFIG_TEXT
        resumed += train(model, optimizer, 2)
        assert (random.random(), np.random.rand(), np.random.randn()) == truth[step]
        save(manager_of(tmp_path), step + 1, model, optimizer)
    assert resumed == straight
    assert_same(all_tensors(model, optimizer), expected)


def test_an_optimizer_that_already_stepped_is_overwritten(three_steps):
    model, optimizer = build(0)
    train(model, optimizer, 3)
    expected = all_tensors(model, optimizer)
    other, other_optimizer = build(7)
    train(other, other_optimizer, 5)
    manager_of(three_steps).restore(model=other, optimizer=other_optimizer)
    assert_same(all_tensors(other, other_optimizer), expected)


def test_a_checkpoint_before_the_first_step(tmp_path):
    model, optimizer = build(0)
    save(manager_of(tmp_path), 0, model, optimizer)
    straight = train(model, optimizer, 2)
    model, optimizer = build(1)
    train(model, optimizer, 1)
    manager_of(tmp_path).restore(model=model, optimizer=optimizer)
    assert not optimizer.state
    assert train(model, optimizer, 2) == straight


def test_learning_rate_is_restored_and_other_settings_stay_with_the_configuration(three_steps, caplog):
    model, optimizer = build(0, lr=1e-2)
    for group in optimizer.param_groups:
        group["lr"] = 123.0
        group["betas"] = (0.5, 0.6)
    manager_of(three_steps).restore(model=model, optimizer=optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.6)] * 2
    assert "betas was [0.9, 0.999] in the checkpoint; the configuration's [0.5, 0.6] is used" in log_of(caplog)


def test_config_toml_is_written_beside_and_non_json_state_is_refused(tmp_path):
    model, optimizer = build(0)
    path = save(manager_of(tmp_path), 1, model, optimizer)
    assert (path / "config.toml").read_text(encoding="utf-8") == CONFIG_TEXT
    with pytest.raises(CheckpointError, match="a tuple would not survive JSON"):
        manager_of(tmp_path).save(
            2, model=model, optimizer=optimizer, train_state={}, data_state={"shape": (1, 2)}, config_text=""
        )
    assert steps_in(tmp_path) == [1]


def test_a_model_that_does_not_fit_is_refused_before_anything_is_loaded(three_steps):
    model = Net(width=6)
    before = all_tensors(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(CheckpointError, match=r"model\.embedding is \(16, 8\) there and \(16, 6\) in the model"):
        manager_of(three_steps).restore(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    assert_same(all_tensors(model, torch.optim.SGD(model.parameters())), before)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"model\.extra\.bias is missing.*another job\.dump_folder"):
        manager_of(three_steps).restore(model=model, optimizer=torch.optim.AdamW(model.parameters()))


# --- which checkpoint -----------------------------------------------------------------------------


def truncate(step_folder: Path) -> None:
    shard = step_folder / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)


def remove_shard(step_folder: Path) -> None:
    (step_folder / "__0_0.distcp").unlink()


def garble_metadata(step_folder: Path) -> None:
    (step_folder / ".metadata").write_bytes(b"not a pickle")


def cut_metadata(step_folder: Path) -> None:
    metadata = step_folder / ".metadata"
    os.truncate(metadata, metadata.stat().st_size // 2)


def flip_byte(step_folder: Path) -> None:
    """One bit of the embedding: neither sizes nor torch.load notice."""
    model, optimizer = build(0)
    train(model, optimizer, int(step_folder.name.removeprefix("step-")))
    shard = step_folder / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    at = content.find(model.embedding.detach().numpy().tobytes())
    assert at > 0
    content[at + 3] ^= 1
    shard.write_bytes(content)


def interrupt(step_folder: Path) -> None:
    (step_folder / ".metadata").unlink()


DAMAGE = {
    truncate: "__0_0.distcp is truncated",
    remove_shard: "__0_0.distcp is missing",
    garble_metadata: "/.metadata is damaged",
    cut_metadata: "/.metadata is damaged",
    flip_byte: "wrong checksum: model.embedding",
    interrupt: "incomplete: no .metadata",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_checkpoints_are_passed_over_with_the_reason(three_steps, damage, caplog):
    folder = three_steps / "checkpoint"
    damage(folder / "step-3")
    damage(folder / "step-2")
    model, optimizer = build(9)
    with caplog.at_level(logging.INFO, logger="lt2titan"):
        loaded = manager_of(three_steps).restore(model=model, optimizer=optimizer)
    assert loaded is not None
    assert loaded.step == 1
    for step in (2, 3):
        assert f"passing over {folder / f'step-{step}'}: " in log_of(caplog)
    assert log_of(caplog).count(DAMAGE[damage]) == 2
    assert f"resuming from {folder / 'step-1'}" in log_of(caplog)
    with pytest.raises(CheckpointError, match=r"load_step = 3: .*Other valid steps: ") as error:
        manager_of(three_steps, load_step=3).choose_start()
    assert DAMAGE[damage] in str(error.value)

    damage(folder / "step-1")
    if damage is interrupt:  # nothing was ever complete: starting over loses nothing, and is said
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lt2titan"):
            assert manager_of(three_steps).choose_start().kind == "scratch"
        assert "starting from scratch" in log_of(caplog)
    else:
        with pytest.raises(CheckpointError, match="holds checkpoints but none is valid"):
            manager_of(three_steps).choose_start()


def test_checksums_can_be_left_out(three_steps):
    flip_byte(three_steps / "checkpoint" / "step-3")
    assert manager_of(three_steps, verify_checksums=False).newest_valid().name == "step-3"
    assert manager_of(three_steps).newest_valid().name == "step-2"


def test_load_step_goes_back_and_a_missing_one_lists_the_valid(three_steps, caplog):
    model, optimizer = build(9)
    loaded = manager_of(three_steps, load_step=1).restore(model=model, optimizer=optimizer)
    assert loaded.step == 1
    assert "the first save will set the newer steps 2, 3 aside" in log_of(caplog)
    with pytest.raises(CheckpointError, match=r"load_step = 7: .*no such folder.*Other valid steps: 1, 2, 3"):
        manager_of(three_steps, load_step=7).restore(model=model, optimizer=optimizer)
    with pytest.raises(CheckpointError, match="Other valid steps: none"):
        manager_of(three_steps / "elsewhere", load_step=7).restore(model=model, optimizer=optimizer)


def test_warm_start_scratch_and_resume_are_told_apart(three_steps, tmp_path_factory, caplog):
    run = tmp_path_factory.mktemp("run")
    (run / "checkpoint").mkdir()  # an empty folder must not stand in the way of a warm start
    truth, truth_optimizer = build(0)
    train(truth, truth_optimizer, 3)
    caplog.set_level(logging.INFO, logger="lt2titan")

    assert manager_of(run).choose_start().kind == "scratch"
    assert f"starting from scratch (no checkpoint in {run / 'checkpoint'})" in log_of(caplog)

    model, optimizer = build(9)
    rng = torch.get_rng_state()
    manager = manager_of(run, initial_load_path=str(three_steps))
    loaded = manager.restore(model=model, optimizer=optimizer)
    assert (loaded.step, loaded.train_state, loaded.data_state) == (0, {}, {})
    assert loaded.config_text == CONFIG_TEXT
    assert_same(dict(model.state_dict()), dict(truth.state_dict()))
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), rng)
    assert f"warm start from {three_steps / 'checkpoint' / 'step-3'} (weights only)" in log_of(caplog)

    full = manager_of(run, initial_load_path=str(three_steps / "checkpoint" / "step-2"), initial_load_model_only=False)
    assert full.restore(model=model, optimizer=optimizer).step == 2
    assert optimizer.state

    save(manager, 5, model, optimizer)
    caplog.clear()
    assert manager.restore(model=model, optimizer=optimizer).step == 5
    assert f"resuming from {run / 'checkpoint' / 'step-5'}; checkpoint.initial_load_path" in log_of(caplog)
    assert manager_of(run, enable=False).choose_start().kind == "scratch"

    flip_byte(three_steps / "checkpoint" / "step-3")
    fresh = tmp_path_factory.mktemp("fresh")
    for bad in (str(three_steps / "checkpoint" / "step-3"), str(three_steps / "nowhere"), str(fresh)):
        with pytest.raises(CheckpointError, match=Path(bad).name):
            manager_of(fresh, initial_load_path=bad).choose_start()


# --- which ones stay ------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "kept"), [(0, [5, 4, 3, 2, 1]), (1, [5]), (2, [5, 4])])
def test_keep_latest_k(tmp_path, keep, kept):
    manager = manager_of(tmp_path, keep_latest_k=keep)
    model, optimizer = build(0)
    for step in range(1, 6):
        save(manager, step, model, optimizer)
    assert steps_in(tmp_path) == kept


def test_interrupted_saves_do_not_count_and_are_removed(three_steps):
    folder = three_steps / "checkpoint"
    interrupt(folder / "step-3")
    (folder / "step-4").mkdir()
    (folder / "step-4" / "__0_0.distcp").write_bytes(b"left over from a killed save")
    (folder / "notes").mkdir()
    model, optimizer = build(0)
    save(manager_of(three_steps, keep_latest_k=3), 4, model, optimizer)
    assert steps_in(three_steps) == [4, 2, 1]
    assert (folder / "notes").exists()
    assert find_problem(folder / "step-4") is None


def test_after_going_back_the_checkpoint_just_written_is_never_the_one_removed(three_steps):
    model, optimizer = build(0)
    os.rename(three_steps / "checkpoint" / "step-3", three_steps / "checkpoint" / "step-30")
    manager = manager_of(three_steps, load_step=1, keep_latest_k=1)
    manager.restore(model=model, optimizer=optimizer)
    save(manager, 2, model, optimizer)
    assert steps_in(three_steps) == [2]


def test_a_save_that_is_not_valid_afterwards_returns_nothing_and_removes_nothing(three_steps, monkeypatch, caplog):
    """What rank 0 sees when another node writes its shard to a disk of its own."""
    write = storage.write_tensors

    def write_elsewhere(state, step_folder, *arguments):
        write(state, step_folder, *arguments)
        remove_shard(step_folder)

    monkeypatch.setattr(storage, "write_tensors", write_elsewhere)
    model, optimizer = build(0)
    assert save(manager_of(three_steps, keep_latest_k=1), 4, model, optimizer) is None
    assert steps_in(three_steps) == [4, 3, 2, 1]
    assert "step-4 is not valid as rank 0 sees it (__0_0.distcp is missing)" in log_of(caplog)
    monkeypatch.undo()
    assert save(manager_of(three_steps, keep_latest_k=1), 4, model, optimizer) == three_steps / "checkpoint" / "step-4"
    assert steps_in(three_steps) == [4]


def test_is_due():
    manager = manager_of(Path("unused"), interval=4)
    assert [step for step in range(1, 10) if manager.is_due(step, last=step == 9)] == [4, 8, 9]
    assert not manager_of(Path("unused"), enable=False).is_due(500, last=True)


# --- what goes wrong while writing ----------------------------------------------------------------


def test_a_file_that_cannot_grow_is_an_error_and_leaves_no_partial_folder(three_steps):
    model, optimizer = build(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (three_steps / "checkpoint" / "step-3" / "__0_0.distcp").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(CheckpointWriteError) as error:
            save(manager_of(three_steps, keep_latest_k=1), 4, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error.value)
    assert str(three_steps / "checkpoint" / "step-4") in str(error.value)
    assert "earlier checkpoints are kept" in str(error.value)
    assert steps_in(three_steps) == [3, 2, 1]
    assert manager_of(three_steps).newest_valid().name == "step-3"


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "checkpoint").write_text("a file where the folder should be")
    model, optimizer = build(0)
    with pytest.raises(CheckpointWriteError, match=r"not saved.*step-1"):
        save(manager_of(tmp_path), 1, model, optimizer)


KILLED = """
import sys, torch
from checkpoint_helpers import manager_of, save
from pathlib import Path
model = torch.nn.Linear(4096, 4096, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
manager = manager_of(Path(sys.argv[1]), keep_latest_k=2)
for step in range(1, 1000):
    torch.nn.init.constant_(model.weight, step)
    save(manager, step, model, optimizer)
"""


def test_sigkill_during_a_save_leaves_the_previous_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)], env=environment)
    try:
        while process.poll() is None:
            writing = [path.parent for path in folder.glob("step-*/__0_0.distcp")]
            if len(writing) > 1 and any(not (path / ".metadata").exists() for path in writing):
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    model = torch.nn.Linear(4096, 4096, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loaded = manager_of(tmp_path).restore(model=model, optimizer=optimizer)
    assert loaded is not None
    assert torch.equal(model.weight, torch.full_like(model.weight, loaded.step))
    interrupted = [step for step, path in list_steps(folder) if not (path / ".metadata").exists()]
    assert interrupted, "the kill came too late to interrupt anything"
    save(manager_of(tmp_path), loaded.step + 1, model, optimizer)
    assert all(find_problem(path) is None for _, path in list_steps(folder))
