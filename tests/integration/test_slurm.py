"""scripts/slurm/train.sbatch on a real cluster of two one-process nodes: two nodes against one process, requeueing,
refusals and a node that dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import ROOT, TINY, environment, losses, metrics, train
from local_slurm import LocalSlurm, local_slurm, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

# Both nodes are this machine: they would share its GPU, which nccl refuses.
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
HORIZON = ["--lr_scheduler.total_steps", "40"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    with local_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(
    cluster: LocalSlurm, log: Path, options: list[str], overrides: list[str], folder: Path = ROOT, **changes: str
) -> str:
    """``sbatch`` from ``folder``; returns the job's number."""
    result = subprocess.run(
        ["sbatch", "--parsable", "--output", str(log), *options, str(ROOT / "scripts/slurm/train.sbatch"), *overrides],
        cwd=folder,
        env={**environment(), **cluster.environment, "CONFIG_FILE": str(TINY), **ON_CPU, **changes},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def wait_for(condition: Callable[[], bool], log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "the job wrote no log"
        time.sleep(0.1)


def final_state(cluster: LocalSlurm, job: str, log: Path) -> tuple[str, str]:
    """JobState and ExitCode of a job once it has ended."""
    wait_for(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), log)
    record = cluster.job(job)
    return record["JobState"], record["ExitCode"]


def newest_step(run: Path) -> int:
    return max((int(path.parent.name.split("-")[1]) for path in run.glob("checkpoint/step-*/.metadata")), default=0)


def kill_trainer(job: str, node: int) -> None:
    """SIGKILL to the training process of the job's ``node``."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile
            continue
        if {f"SLURM_JOB_ID={job}".encode(), f"SLURM_NODEID={node}".encode()} <= set(variables) and any(
            variable.startswith(b"LOCAL_RANK=") for variable in variables
        ):
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError(f"no training process of job {job} on node {node}")


def test_two_nodes_train_as_one_process_and_survive_a_requeue(cluster: LocalSlurm, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "job.out"
    nodes = ["--nodes", "2"]
    # Half the local batch: as the file has it, two ranks would be refused.
    overrides = ["--job.dump_folder", str(run), "--training.local_batch_size", "2", *HORIZON]
    job = submit(cluster, log, nodes, [*overrides, "--training.steps", "20"])
    assert final_state(cluster, job, log) == ("COMPLETED", "0:0"), log.read_text()
    assert "2 x 1 processes on n[1-2]" in log.read_text() and "starting from scratch" in log.read_text()
    assert "FSDP2 over 2 ranks" in log.read_text() and "[node1.rank0]" not in log.read_text()
    assert "[node1.rank0]" in (tmp_path / "job.out.node1").read_text()

    log = tmp_path / "requeued.out"
    job = submit(cluster, log, nodes, [*overrides, "--training.steps", "100000"])
    wait_for(lambda: newest_step(run) >= 30, log)
    assert re.search(r"resuming from \S+step-20", log.read_text())
    cluster.run("scontrol", "requeue", job)
    wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", log)
    # Nothing of the first start is left to write another checkpoint.
    newest = newest_step(run)
    wait_for(lambda: newest_step(run) >= max(40, newest + 10), log)
    assert "start 2: 2 x 1 processes" in log.read_text() and f"step-{newest}" in log.read_text().split("start 2:")[1]

    kill_trainer(job, node=1)
    state, exit_code = final_state(cluster, job, log)
    assert state == "FAILED" and exit_code != "0:0"
    assert "n2: task 1" in log.read_text() and f"{log}.node<n>" in log.read_text()

    records = metrics(run)
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    train(tmp_path / "one", "--training.steps", "40", *HORIZON, **ON_CPU)
    assert losses(run)[:40] == pytest.approx(losses(tmp_path / "one"), rel=1e-2)
    assert losses(run)[:8] == pytest.approx(losses(tmp_path / "one")[:8], rel=1e-5)


def test_a_bad_override_fails_the_job_with_its_message(cluster: LocalSlurm, tmp_path: Path) -> None:
    log = tmp_path / "job.out"
    overrides = ["--job.dump_folder", str(tmp_path / "run"), "--training.stepz", "5"]
    job = submit(cluster, log, ["--nodes", "2"], overrides)
    assert final_state(cluster, job, log) == ("FAILED", "2:0")
    assert log.read_text().count("--training.steps") == 1 and "Traceback" not in log.read_text()
    assert not (tmp_path / "run").exists() and not (tmp_path / "job.out.node1").exists()


def test_processes_per_node_are_the_gpus_that_slurm_gave(cluster: LocalSlurm, tmp_path: Path) -> None:
    """The node has two, which makes a batch of 4 per process too large: refused, naming the processes."""
    log = tmp_path / "job.out"
    job = submit(cluster, log, ["--partition", "gpu", "--nodes", "1"], ["--training.local_batch_size", "4"], NGPU="")
    assert final_state(cluster, job, log) == ("FAILED", "2:0")
    assert re.search(r"global_batch_size = 4: .* = 4 x 2 = 8", log.read_text())


def test_the_checkout_is_found_or_asked_for(cluster: LocalSlurm, tmp_path: Path) -> None:
    log = tmp_path / "lost.out"
    job = submit(cluster, log, ["--nodes", "1"], [], folder=tmp_path)
    assert final_state(cluster, job, log) == ("FAILED", "2:0")
    assert "set LT2_ROOT" in log.read_text()
    log = tmp_path / "found.out"
    job = submit(cluster, log, ["--nodes", "1"], ["--help"], folder=tmp_path, LT2_ROOT=str(ROOT))
    assert final_state(cluster, job, log) == ("COMPLETED", "0:0")
    assert "--training.steps" in log.read_text()
