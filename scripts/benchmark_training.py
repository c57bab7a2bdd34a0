"""What a recipe's training costs on this device: throughput, memory and compile time of many variants of it.

python scripts/benchmark_training.py [--cases 'modes/*' float8/block-rowwise] [--output FILE] [--skip-done]

Each case (scripts/training_cases.py; --list-cases shows them) trains a few steps on random tokens in a process of its
own, which leaves nothing to the next: no compiled graph, memory or compiler setting. After each its JSON object is
printed and added to a file, and its log lies beside it; a table of all ends the run. Speeds are comparable within one
run on one machine: put what is to be compared into one command, and let it alternate with --repeats.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import tyro
from measured_recipe import measured_recipe
from rich import box
from rich.console import Console
from rich.table import Table
from training_cases import CASES, Case

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("config", "overrides", "warm_up", "steps")
ENDING = (signal.SIGINT, signal.SIGTERM)
"""Signals that end a run, and the case at hand with it."""


@dataclass(kw_only=True)
class Arguments:
    """Measure variants of a recipe."""

    cases: list[str] = field(default_factory=lambda: ["*"])
    """Names of cases, or patterns of them: 'modes/*'."""
    config: Path = ROOT / "train_configs" / "lt2_1.3b.toml"
    """The recipe."""
    overrides: list[str] = field(default_factory=list)
    """Changes to the recipe in every case: key=value, or key for a switch. What a case itself sets goes first."""
    warm_up: int = 3
    """Steps before those that are measured."""
    steps: int = 8
    """Steps that are measured, where the case does not say how many."""
    repeats: int = 1
    """Rounds through all cases, to see how far the same case differs."""
    timeout: int = 600
    """Seconds that one case may take."""
    output: Path = Path("outputs/benchmark_training.jsonl")
    """Results are added to this file, one JSON object per line; logs go into a folder beside it."""
    skip_done: bool = False
    """Leave out what the file already has a result of, with the same settings."""
    list_cases: bool = False
    """Only show the cases that would run."""


def selected(patterns: Iterable[str]) -> dict[str, Case]:
    """Cases by name, in their own order.

    Raises:
        SystemExit: a pattern fits none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in CASES):
            sys.exit(f"benchmark_training: --cases {pattern}: there are {', '.join(CASES)}")
    return {name: case for name, case in CASES.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def overrides(case: Case, arguments: Arguments) -> list[str]:
    return [*arguments.overrides, *case.overrides]


def settings(case: Case, arguments: Arguments) -> dict[str, Any]:
    """What a result is a result of."""
    return {
        "config": str(arguments.config),
        "overrides": overrides(case, arguments),
        "warm_up": arguments.warm_up,
        "steps": case.n_steps or arguments.steps,
    }


def run(name: str, case: Case, arguments: Arguments, repeat: int) -> dict[str, Any]:
    """Measure one case in a new process; a failure is a result with "error"."""
    what = settings(case, arguments)
    log = arguments.output.with_suffix("") / f"{name.replace('/', '-')}-{repeat}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, log.open("w") as text:
        report = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "scripts" / "measure_training.py"), "--config", what["config"]]
        command += ["--warm-up", str(what["warm_up"]), "--steps", str(what["steps"]), "--json", str(report)]
        command += ["--profile"] if case.is_profiled else []
        command += [f"--{override}" for override in what["overrides"]]
        environment = os.environ | (cold_caches(Path(folder)) if case.is_cold else {})
        status: int | str
        process = None
        try:
            with deferred(ENDING):  # until there is something to end
                process = subprocess.Popen(
                    command, stdout=text, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
            status = process.wait(arguments.timeout)
        except subprocess.TimeoutExpired:
            status = f"not done after {arguments.timeout} s"
        finally:
            if process is not None:  # its compile workers too, which would disturb the next case
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        measured = json.loads(report.read_text()) if report.exists() else {"error": f"{status}: {last_words(log)}"}
    seconds = round(time.perf_counter() - start, 1)
    return {"case": name, "repeat": repeat, **what, "process_seconds": seconds, **measured}


@contextmanager
def deferred(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Signals that come within are handled at its end.

    It replaces Python's handlers instead of blocking signals (pthread_sigmask): a signal that only the main thread
    blocks is taken by another thread, and its handler runs in the main thread all the same.
    """
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def cold_caches(folder: Path) -> dict[str, str]:
    """Environment in which torch.compile finds none of its graphs and kernels, and other Triton kernels are as they
    are in TRITON_CACHE_DIR: tuning these takes minutes and is no compilation."""
    triton = folder / "triton"
    known = os.environ.get("TRITON_CACHE_DIR")
    if known and Path(known).is_dir():
        shutil.copytree(known, triton, ignore=_made_by_inductor)
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(triton)}


def _made_by_inductor(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(("triton_", "__grp__triton_"))]


def last_words(log: Path) -> str:
    """What an error's last lines say."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or [""])[-1][:500]


def done(output: Path) -> Iterator[dict[str, Any]]:
    """The results in a file of earlier runs, errors left out."""
    if output.exists():
        results = (json.loads(line) for line in output.read_text().splitlines())
        yield from (result for result in results if "error" not in result)


def show(results: Iterable[dict[str, Any]]) -> None:
    table = Table(
        "case",
        "tokens",
        "tokens/s",
        "ms",
        "MFU",
        "TFLOP/s",
        "loops",
        "peak GiB",
        "estimate",
        "graphs",
        "compiler s",
        "again",
        "loss",
        box=box.SIMPLE_HEAD,
    )
    for result in results:
        if "error" in result:
            table.add_row(result["case"], "[red]failed[/red]")
            continue
        ratio, compilation = result["predicted_over_measured"], result["compilation"]
        is_varied = len(set(result["loops"])) > 1  # a median would be that of the steps with a middling number
        table.add_row(
            result["case"],
            f"{result['tokens_per_step']:,}",
            f"{result['mean_tokens_per_second' if is_varied else 'tokens_per_second']:,.0f}",
            f"{1e3 * result['tokens_per_step'] / result['mean_tokens_per_second'] if is_varied else result['ms']:.0f}",
            "-" if result["mfu"] is None else f"{result['mfu']:.1%}",
            f"{result['tflops']:.1f}",
            f"{sum(result['loops']) / len(result['loops']):.3g}",
            f"{result['peak_memory_gib']:.1f}",
            f"{result['predicted_memory_gib']:.1f}" + ("" if ratio is None else f" ({ratio - 1:+.0%})"),
            *(
                (f"{compilation['graphs']}", f"{compilation['seconds']:.1f}", f"{compilation['recompiled']}")
                if compilation
                else ("-", "-", "-")
            ),
            f"{result['first_loss']:.3f} to {result['last_loss']:.3f}",
        )
    Console(width=max(170, Console().width)).print(table)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    cases = selected(arguments.cases)
    if arguments.list_cases:
        for name, case in cases.items():
            print(f"{name:36}{' '.join(case.overrides)}")
        return
    for case in cases.values():  # what is mistyped ends the run here, not after the first cases
        what = settings(case, arguments)
        measured_recipe(
            what["config"],
            [f"--{override}" for override in what["overrides"]],
            n_warm_up=what["warm_up"],
            n_steps=what["steps"],
            is_profiled=case.is_profiled,
            folder="outputs",
        )
    known = {(r["case"], r["repeat"], *map(str, map(r.get, SETTINGS))): r for r in done(arguments.output)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    # As an exception, so that the case at hand ends too, and its GPU is free.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmark_training: terminated"))
    results = []
    for repeat in range(arguments.repeats):
        for name, case in cases.items():
            key = (name, repeat, *map(str, settings(case, arguments).values()))
            if arguments.skip_done and key in known:
                print(f"{name}: done already")
                results.append(known[key])
                continue
            result = run(name, case, arguments, repeat)
            with arguments.output.open("a") as file:
                file.write(json.dumps(result) + "\n")
            results.append(result)
            print(json.dumps(result | {"profile": None} if "profile" in result else result), flush=True)
    show(results)
    if failed := [result for result in results if "error" in result]:
        reasons = "".join(f"\n{result['case']}: {result['error']}" for result in failed)
        sys.exit(
            f"benchmark_training: {len(failed)} failed, see the logs in {arguments.output.with_suffix('')}{reasons}"
        )


if __name__ == "__main__":
    main()
