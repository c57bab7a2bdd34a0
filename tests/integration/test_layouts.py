"""Every layout of layout_cases.py trains as one process does: ten losses, the first gradients, ten gradient norms."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import ROOT, environment, kill_all, metrics
from layout_cases import CASES, LAYOUTS, MIXERS, MODELS, WIDE, Case

PATIENCE = 180
"""Seconds without an outcome after which a run hangs; while processes start, which import torch side by side, more."""
PATIENCE_AT_START = 400

CASES_PER_LAUNCH = 25
"""Every mesh leaves process groups with threads and sockets of their own: sixty cases of four ranks had a thousand."""

OF_THE_MACHINE = {"tokens_per_second", "mfu", "tflops", "memory_gib", "data_wait_fraction", "time"}
EXACT = {"step", "lr", "loops", "tokens_seen", "skipped_steps"}


class Launch:
    """Runs cases one after another in the same ``n_ranks`` processes, in the background."""

    def __init__(self, folder: Path, n_ranks: int, names: list[str]) -> None:
        self.folder, self.n_ranks = folder, n_ranks
        self.left = names
        self.failures: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None

    def wait_for(self, case: Case) -> Path:
        """Until ``case`` has run; its folder."""
        while case.name in self.left:
            if self.process is None:
                self._start()
            elif (self.folder / self.left[0] / "finished").exists():
                if self.left[0] == self.last:
                    self.stop()
                self.left, self.since, self.patience = self.left[1:], time.monotonic(), PATIENCE
            elif reason := self._trouble():
                # The others may wait for a rank that has left: what is left starts anew.
                self.stop()
                self.failures[self.left[0]] = reason + self._what_ranks_say()
                self.left = self.left[1:]
            else:
                time.sleep(0.05)
        assert case.name not in self.failures, f"{case.name}: {self.failures[case.name]}"
        return self.folder / case.name

    def _start(self) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.n_ranks)]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        worker = str(Path(__file__).with_name("layout_worker.py"))
        names = self.left[:CASES_PER_LAUNCH]
        self.last = names[-1]
        self.log = self.folder / f"{self.n_ranks} ranks, {len(self.left)} left.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*torchrun, worker, str(self.folder), *names],
                env=environment(PYTHONPATH=str(ROOT)),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.since, self.patience = time.monotonic(), PATIENCE_AT_START

    def _trouble(self) -> str:
        """Why the run at hand will not finish; "" while it may."""
        assert self.process is not None
        if self.process.poll() is not None and not (self.folder / self.left[0] / "finished").exists():
            return "its processes are gone"
        if time.monotonic() - self.since > self.patience:
            return f"hung for {self.patience} s, and was ended"
        return ""

    def _what_ranks_say(self) -> str:
        errors = sorted((self.folder / self.left[0]).glob("failed-*"))
        texts = [error.read_text() for error in errors] or [self.log.read_text(errors="replace")[-4000:]]
        return "\n".join(["", *texts])

    def stop(self) -> None:
        if self.process is not None:
            kill_all(self.process)
        self.process = None


class Launches:
    """One `Launch` per number of ranks, of all ``cases`` with it."""

    def __init__(self, folder: Path, cases: list[Case]) -> None:
        runs = list(dict.fromkeys([run for case in cases for run in (case.reference, case)]))
        numbers = {run.n_ranks for run in runs}
        self.of = {n: Launch(folder, n, [run.name for run in runs if run.n_ranks == n]) for n in numbers}

    def wait_for(self, case: Case) -> Path:
        return self.of[case.n_ranks].wait_for(case)


def write_documents(path: Path) -> None:
    """Short ones: most rows of 32 bytes hold several, and some documents several rows."""
    rng = random.Random(0)
    words = ["loop", "state", "token", "head", "of", "the", "and", "a"]
    texts = (" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(400))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launches]:
    """Of the cases that this session runs."""
    chosen = [item.callspec.params["case"] for item in request.session.items if "launches" in item.fixturenames]
    folder = tmp_path_factory.mktemp("layouts")
    write_documents(folder / "documents.jsonl")
    launches = Launches(folder, chosen)
    yield launches
    for launch in launches.of.values():
        launch.stop()


def column(records: list[dict[str, Any]], name: str) -> list[Any]:
    """One figure of every step that has it: a step of fewer loops lacks those of the last."""
    return [record[name] for record in records if name in record]


def relative_error(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name) for case in CASES]
    + [pytest.param(case, id=case.name, marks=pytest.mark.wide) for case in WIDE],
)
def test_trains_as_one_process(case: Case, launches: Launches) -> None:
    expected, found = launches.wait_for(case.reference), launches.wait_for(case)
    with np.load(found / "gradients.npz") as ours, np.load(expected / "gradients.npz") as theirs:
        assert set(ours) == set(theirs)
        errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    assert all(error <= case.gradients for error in errors.values()), errors  # NaN is no smaller
    theirs, ours = metrics(expected), metrics(found)
    assert len(theirs) == 10
    for name in EXACT:
        assert [record[name] for record in ours] == [record[name] for record in theirs], name
    assert column(ours, "loss") == pytest.approx(column(theirs, "loss"), rel=case.losses)
    for name in set().union(*theirs) - OF_THE_MACHINE - EXACT - {"loss"}:
        assert column(ours, name) == pytest.approx(column(theirs, name), rel=case.norms), name


def test_the_table_covers_what_it_can_say() -> None:
    names = [case.name for case in [*CASES, *WIDE]]
    assert len(set(names)) == len(names)
    assert {mixer for case in CASES for mixer in case.model.split()[0].split("+")} == set(MIXERS)
    assert {case.model for case in [*CASES, *WIDE]} == set(MODELS)
    assert {word for case in [*CASES, *WIDE] for word in case.layout.split()} == set(LAYOUTS) - {"plain"}
    assert {case.n_ranks for case in CASES} == {1, 2, 4}
