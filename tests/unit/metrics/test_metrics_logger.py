from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lt2titan.metrics.config import MetricsConfig
from lt2titan.metrics.metrics_logger import MetricsLogger
from lt2titan.metrics.record import TrainingRecord, ValidationRecord
from lt2titan.metrics.wandb import WandbSink


def record(step: int, loss: float | None = None) -> TrainingRecord:
    return TrainingRecord(
        step=step,
        loss=1 / step if loss is None else loss,
        grad_norm=0.5,
        lr=3e-4,
        loops=4,
        tokens_per_second=1000.0,
        tokens_seen=64 * step,
        mfu=None,
        tflops=0.1,
        memory_gib=2.0,
        data_wait_fraction=0.01,
        skipped_steps=0,
        extra={"grad_norm/core": step / 16, "residual_rms/loop_2": 2.0},
    )


def run(config: MetricsConfig, folder: Path, first: int, last: int, resume_step: int = 0) -> None:
    with MetricsLogger(config, folder, steps=last, resume_step=resume_step) as logger:
        for step in range(first, last + 1):
            logger.log(record(step))
            if step % 2 == 0:
                extra = {"exit_loss/loop_1": step / 4}
                logger.log(ValidationRecord(step=step, validation_loss=step / 8, bits_per_byte=step / 16, extra=extra))


def test_steps_that_are_logged(tmp_path: Path) -> None:
    logger = MetricsLogger(MetricsConfig(log_freq=10), tmp_path, steps=25, is_main=False)
    assert [step for step in range(1, 26) if logger.should_log(step)] == [1, 10, 20, 25]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = MetricsConfig(enable_tensorboard=True)
    with MetricsLogger(config, tmp_path / "run", steps=2, is_main=False) as logger:
        logger.log(record(1))
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_records_reach_file_and_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(MetricsConfig(), tmp_path, 1, 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [(1, True), (2, True), (2, False), (3, True)]
    assert [line.get("residual_rms/loop_2") for line in lines] == [2.0, 2.0, None, 2.0]
    assert lines[2]["exit_loss/loop_1"] == 2 / 4
    console = capsys.readouterr().out
    assert [line.split()[1] for line in console.splitlines()] == ["1/3", "2/3", "2/3", "3/3"]
    assert "loop" not in console and "core" not in console


def read_scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_continues_after_a_resume(tmp_path: Path) -> None:
    config = MetricsConfig(enable_tensorboard=True, save_tb_folder="logs/tb")
    run(config, tmp_path, 1, 9)
    run(config, tmp_path, 7, 12, resume_step=6)  # steps 7 to 9 are done again
    assert len(list((tmp_path / "logs/tb").iterdir())) == 2
    scalars = read_scalars(tmp_path / "logs/tb", "train/loss")
    assert scalars == [(step, pytest.approx(1 / step)) for step in range(1, 13)]
    bits = read_scalars(tmp_path / "logs/tb", "validation/bits_per_byte")
    assert bits == [(step, step / 16) for step in (2, 4, 6, 8, 10, 12)]
    # The members of a family share a group, whatever record they come with.
    core = read_scalars(tmp_path / "logs/tb", "grad_norm/core")
    assert core == [(step, step / 16) for step in range(1, 13)]
    exits = read_scalars(tmp_path / "logs/tb", "exit_loss/loop_1")
    assert exits == [(step, step / 4) for step in (2, 4, 6, 8, 10, 12)]


def test_tensorboard_fresh_start_supersedes_everything(tmp_path: Path) -> None:
    config = MetricsConfig(enable_tensorboard=True)
    run(config, tmp_path, 1, 5)
    run(config, tmp_path, 1, 3)
    assert [step for step, _ in read_scalars(tmp_path / "tb", "train/loss")] == [1, 2, 3]


def test_tensorboard_leaves_out_what_is_no_number(tmp_path: Path) -> None:
    with MetricsLogger(MetricsConfig(enable_tensorboard=True), tmp_path, steps=2) as logger:
        logger.log(record(1, loss=float("nan")))
        logger.log(record(2))
    assert read_scalars(tmp_path / "tb", "train/loss") == [(2, 0.5)]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert "train/mfu" not in events.Tags()["scalars"]


@pytest.fixture
def no_wandb_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without W&B settings or login, whatever the machine has."""
    for name in (
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_RUN_ID",
        "WANDB_BASE_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home / name.lower()))
    monkeypatch.setenv("WANDB_SILENT", "true")


def read_wandb_records(path: Path) -> Iterator[Any]:
    """The records of a W&B transaction log: a 7-byte header, then LevelDB log blocks of protobufs."""
    from wandb.proto import wandb_internal_pb2

    data, position, pending = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, position)
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or its last part
            message = wandb_internal_pb2.Record()
            message.ParseFromString(pending)
            pending = b""
            yield message


def read_wandb_run(path: Path) -> tuple[str, dict[int, dict[str, Any]]]:
    run_id, history = "", {}
    for message in read_wandb_records(path):
        if message.HasField("run"):
            run_id = message.run.run_id
        if message.HasField("history"):
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message.history.item
            }
            history[message.history.step.num] = items
    return run_id, history


def test_wandb_offline_resumes_the_same_run(
    tmp_path: Path, no_wandb_login: None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    config = MetricsConfig(enable_wandb=True)
    run(config, folder, 1, 5)
    assert "recorded offline" in caplog.text  # no key: it says so
    run(config, folder, 5, 6, resume_step=4)
    wandb.teardown()  # waits for W&B's process to have written everything; finishing a run does not
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    (first_id, first), (second_id, second) = (read_wandb_run(file) for file in files)
    assert first_id == second_id == (folder / "wandb_run_id.txt").read_text().strip()
    assert {step: values["train/loss"] for step, values in first.items()} == {s: 1 / s for s in range(1, 6)}
    assert {step: values["train/loss"] for step, values in second.items()} == {5: 1 / 5, 6: 1 / 6}
    assert second[6]["validation/bits_per_byte"] == 6 / 16  # shares the step with the training record
    assert second[6]["grad_norm/core"] == 6 / 16 and second[6]["exit_loss/loop_1"] == 6 / 4


def test_wandb_fresh_start_is_a_new_run(tmp_path: Path, no_wandb_login: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for _ in range(2):
        sink = WandbSink(tmp_path / "run", project="test")
        ids.append(sink.run_id)
        sink.close(failed=False)
    assert ids[0] != ids[1]


def test_missing_wandb_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python does for a blocked import
    with pytest.raises(RuntimeError, match="pip install wandb"):
        MetricsLogger(MetricsConfig(enable_wandb=True), tmp_path, steps=1)
