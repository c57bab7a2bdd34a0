"""Check every operator on this device against fp64: outputs, all gradients, states, packed documents, decoding.

    python -m lt2titan.kernels.check

Prints the largest error of each case and exits with 1 if one is out of tolerance. Run it once on new hardware or after
an upgrade of torch, Triton or flash-linear-attention.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from lt2titan.config.section import ConfigError
from lt2titan.kernels.backend import backend_versions, resolve_backend
from lt2titan.kernels.check.case import Case
from lt2titan.kernels.check.cases import OPERATORS, cases_of, errors_of
from lt2titan.kernels.check.tolerance import tolerance_of


@dataclass(kw_only=True)
class Arguments:
    """Check every operator on this device against fp64."""

    operators: list[str] = field(default_factory=lambda: list(OPERATORS))
    """Only these."""
    dtypes: list[Literal["bfloat16", "float16", "float32"]] = field(default_factory=lambda: ["bfloat16", "float32"])
    """Of the activations."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu, cuda, or auto: the GPU if there is one."""
    backend: Literal["auto", "reference", "fla"] = "auto"
    """As kernels.backend."""
    tuning_configs: int = 2
    """Configurations that each Triton kernel may choose among: nearly all of the time is compiling them. 0 allows
    all, as in training."""
    json: Path | None = None
    """Also write the results to this file."""

    def problem(self) -> str:
        unknown = [name for name in self.operators if name not in OPERATORS]
        if unknown:
            return f"--operators {' '.join(unknown)}: there are {', '.join(OPERATORS)}"
        if not self.operators or not self.dtypes:
            return "--operators and --dtypes need at least one name each: without a case nothing is checked"
        if self.json and not self.json.resolve().parent.is_dir():
            return f"--json {self.json}: there is no folder {self.json.resolve().parent}"
        if self.tuning_configs < 0:
            return f"--tuning-configs {self.tuning_configs}: must be positive, or 0 for all"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "--device cuda: there is no GPU here"
        return ""


def limit_tuning(n_configs: int) -> None:
    """Let every Triton kernel defined from here on choose among `n_configs` configurations, spread over its list."""
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.__init__

    def init(self: Any, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        if len(configs) > n_configs:
            steps = max(n_configs - 1, 1)
            configs = [configs[i * (len(configs) - 1) // steps] for i in range(n_configs)]
        original(self, fn, arg_names, configs, *args, **kwargs)

    Autotuner.__init__ = init


def check(case: Case, device: torch.device, backend: str) -> dict[str, Any]:
    """Run one case: its errors, or what it raised."""
    start = time.perf_counter()
    result: dict[str, Any] = {"case": case.name, "errors": {}, "raised": ""}
    try:
        result["errors"] = errors = errors_of(case, device, backend)
        bad = {n: e for n, e in errors.items() if not e <= tolerance_of(case, n, device)}  # NaN is bad
    except Exception as error:  # a kernel that raises has failed its case, and the others go on
        result["raised"], bad = f"{type(error).__name__}: {error}", {}
    result |= {"seconds": time.perf_counter() - start, "out_of_tolerance": bad}
    return result | {"passed": not bad and not result["raised"]}


def main(argv: list[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, description=__doc__, args=argv)
    if problem := arguments.problem():
        print(f"lt2titan.kernels.check: {problem}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING)
    use_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_gpu else "cpu")
    try:
        backend = resolve_backend(arguments.backend, device)
    except ConfigError as error:
        print(f"lt2titan.kernels.check: {error}", file=sys.stderr)
        return 2
    if backend == "fla" and arguments.tuning_configs:
        limit_tuning(arguments.tuning_configs)
    hardware = torch.cuda.get_device_name() if use_gpu else "CPU"
    console = Console(width=max(150, Console().width))
    versions = ", ".join(f"{name} {version}" for name, version in backend_versions().items())
    console.print(f"{hardware}, backend {backend}; {versions}")
    table = Table("", "operator", "dtype", "case", "tokens and sizes", "error", "of", "allowed", box=box.SIMPLE_HEAD)
    results = []
    cases = [
        case
        for operator in arguments.operators
        for dtype in arguments.dtypes
        for case in cases_of(operator, getattr(torch, dtype), backend)
    ]
    with console.status("") as status:
        for number, case in enumerate(cases, start=1):
            status.update(f"{number} of {len(cases)}: {case.name}")
            result = check(case, device, backend)
            results.append(result)
            table.add_row(*_row(case, result, device))
    console.print(table)
    failed = [result for result in results if not result["passed"]]
    for result in failed:
        console.print(f"[red]FAILED[/red] {result['case']}: {result['raised'] or result['errors']}", highlight=False)
    console.print(f"{len(results) - len(failed)} of {len(results)} cases passed")
    if arguments.json:
        report = {"device": hardware, "backend": backend, "versions": backend_versions(), "cases": results}
        arguments.json.write_text(json.dumps(report, indent=1))
    return 1 if failed else 0


def _row(case: Case, result: dict[str, Any], device: torch.device) -> tuple[str, ...]:
    mark = "[green]ok[/green]" if result["passed"] else "[red]FAIL[/red]"
    start = (mark, case.operator, case.dtype_name, case.what, case.shape)
    if result["raised"]:
        return *start, "-", "raised", "-"
    errors = result["errors"]
    # Nearest to its own bound, so that what is close to failing shows.
    worst = max(errors, key=lambda n: (errors[n] != errors[n], errors[n] / tolerance_of(case, n, device)))
    return *start, f"{errors[worst]:.1e}", worst, f"{tolerance_of(case, worst, device):.0e}"


if __name__ == "__main__":
    sys.exit(main())
