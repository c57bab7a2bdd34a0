"""Going back with load_step. Steps of the old branch hold weights of their own, so that a mix-up shows."""

from __future__ import annotations

import json
import logging
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_helpers import all_tensors, assert_same, build, manager_of, save, train

from lt2titan.checkpoint import branch
from lt2titan.checkpoint.folders import list_steps, resolve_checkpoint
from lt2titan.checkpoint.manager import CheckpointManager
from lt2titan.checkpoint.storage import CheckpointError, CheckpointWriteError


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoint").iterdir())


def start(run: Path, **options: object):
    """A process of the run: its manager, what it resumed, and the state that this gave it."""
    manager = manager_of(run, **options)
    model, optimizer = build(99)
    loaded = manager.restore(model=model, optimizer=optimizer)
    assert loaded is not None
    return manager, loaded.step, model, optimizer


def step_and_save(manager: CheckpointManager, step: int, model, optimizer) -> dict[str, torch.Tensor]:
    train(model, optimizer, 1)
    save(manager, step, model, optimizer)
    return all_tensors(model, optimizer)


@pytest.fixture
def old_branch(tmp_path: Path) -> Path:
    """A run folder with steps 12, 16 and 20."""
    manager = manager_of(tmp_path)
    model, optimizer = build(0)
    for step in (12, 16, 20):
        step_and_save(manager, step, model, optimizer)
    return tmp_path


def test_a_plain_start_after_going_back_continues_the_new_branch(old_branch, caplog):
    content = (old_branch / "checkpoint" / "step-20" / "__0_0.distcp").read_bytes()
    manager, step, model, optimizer = start(old_branch, load_step=16, keep_latest_k=2)
    assert step == 16
    assert names_in(old_branch) == ["step-12", "step-16", "step-20"]  # as long as nothing is saved
    assert start(old_branch)[1] == 20
    with caplog.at_level(logging.INFO, logger="lt2titan"):
        saved = step_and_save(manager, 18, model, optimizer)
    assert "abandoned-step-20 (not used or counted" in caplog.text
    assert names_in(old_branch) == ["abandoned-step-20", "branch.json", "step-16", "step-18"]

    manager, step, model, optimizer = start(old_branch, keep_latest_k=2)
    assert step == 18
    assert_same(all_tensors(model, optimizer), saved)
    step_and_save(manager, 20, model, optimizer)
    assert names_in(old_branch) == ["abandoned-step-20", "branch.json", "step-18", "step-20"]
    assert resolve_checkpoint(old_branch).name == "step-20"
    abandoned = old_branch / "checkpoint" / "abandoned-step-20"
    assert (abandoned / "__0_0.distcp").read_bytes() == content
    assert resolve_checkpoint(abandoned) == abandoned


def test_the_same_command_again_continues_the_new_branch(old_branch, caplog):
    caplog.set_level(logging.INFO, logger="lt2titan")
    for expected in (16, 18, 20):  # a requeued job: load_step is in its command line every time
        manager, step, model, optimizer = start(old_branch, load_step=16)
        assert step == expected
        step_and_save(manager, step + 2, model, optimizer)
    assert [step for step, _ in list_steps(old_branch / "checkpoint")] == [22, 20, 18, 16, 12]
    assert "the run went back to step 16 before (as " in caplog.text

    (old_branch / "checkpoint" / "branch.json").unlink()  # the documented way to go back once more
    manager, step, model, optimizer = start(old_branch, load_step=16)
    assert step == 16
    step_and_save(manager, 20, model, optimizer)
    abandoned = ["abandoned-step-18", "abandoned-step-20", "abandoned-step-20.1", "abandoned-step-22"]
    assert names_in(old_branch) == [*abandoned, "branch.json", "step-12", "step-16", "step-20"]

    manager, step, model, optimizer = start(old_branch, load_step=12)  # another step is another going back
    assert step == 12
    step_and_save(manager, 13, model, optimizer)
    assert start(old_branch, load_step=12)[1] == start(old_branch)[1] == 13


def test_going_back_to_the_newest_step_is_remembered_too(old_branch):
    manager, _, model, optimizer = start(old_branch, load_step=20)
    step_and_save(manager, 24, model, optimizer)
    assert start(old_branch, load_step=20)[1] == 24
    assert names_in(old_branch) == ["branch.json", "step-12", "step-16", "step-20", "step-24"]


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


@pytest.mark.parametrize("when", range(4))
def test_a_kill_while_the_old_branch_is_set_aside_loses_nothing(old_branch, monkeypatch, when):
    """Killed before the n-th change of a name: steps 20 and 18 set aside, branch.json in place, and after that."""
    step_and_save(*start_at(old_branch, 18))
    os.rename(old_branch / "checkpoint" / "step-20x", old_branch / "checkpoint" / "step-20")
    manager, _, model, optimizer = start(old_branch, load_step=16)
    n_moves = 0

    def killable(move):
        def act(source, target):
            nonlocal n_moves
            if n_moves == when:
                raise Killed
            n_moves += 1
            move(source, target)

        return act

    killed_os = SimpleNamespace(rename=killable(os.rename), replace=killable(os.replace), fsync=os.fsync)
    monkeypatch.setattr(branch, "os", killed_os)
    with pytest.raises(Killed):
        save(manager, 20, model, optimizer)
        raise Killed  # all names were changed: the kill comes right after the save
    monkeypatch.undo()

    complete = [path for path in (old_branch / "checkpoint").iterdir() if (path / ".metadata").exists()]
    assert len(complete) == (5 if when == 3 else 4)  # nothing went missing
    assert start(old_branch)[1] == {0: 20, 1: 18, 2: 16, 3: 20}[when]
    manager, step, model, optimizer = start(old_branch, load_step=16)
    assert step == (20 if when == 3 else 16)
    expected = step_and_save(manager, 22, model, optimizer)
    for options in ({}, {"load_step": 16}):
        _, step, model, optimizer = start(old_branch, **options)
        assert step == 22
        assert_same(all_tensors(model, optimizer), expected)


def start_at(run: Path, step: int):
    """Make room to save ``step`` on the old branch, with step 20 out of the way."""
    os.rename(run / "checkpoint" / "step-20", run / "checkpoint" / "step-20x")
    manager, _, model, optimizer = start(run)
    return manager, step, model, optimizer


def test_a_save_that_fails_after_going_back_keeps_the_old_branch_aside(old_branch):
    manager, _, model, optimizer = start(old_branch, load_step=16)
    before = (old_branch / "checkpoint" / "step-20" / "__0_0.distcp").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointWriteError, match="File too large"):
            save(manager, 20, model, optimizer)  # the very name that the old branch has
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (old_branch / "checkpoint" / "abandoned-step-20" / "__0_0.distcp").read_bytes() == before
    assert start(old_branch)[1] == 16


def test_a_branch_file_that_cannot_be_read_names_the_way_out(old_branch):
    for content in ("{", "[]", '{"load_step": "16"}', "{}"):
        (old_branch / "checkpoint" / "branch.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"branch\.json cannot be read: .*Remove it"):
            manager_of(old_branch, load_step=16).choose_start()
        assert manager_of(old_branch).choose_start().path == old_branch / "checkpoint" / "step-20"
    (old_branch / "checkpoint" / "branch.json").write_text(json.dumps({"load_step": 12}))
    assert manager_of(old_branch, load_step=16).choose_start().path == old_branch / "checkpoint" / "step-16"
