"""Where a training step went, from a trace that [profiling] wrote.

python scripts/summarize_trace.py outputs/run/profile_traces/iteration_10/rank0_trace.json.gz [--top 20] [--json]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from lt2titan.metrics.trace_summary import TraceError, read_trace, render, summarize


@dataclass(kw_only=True)
class Arguments:
    """Time by phase, loop, kind of block and kernel or operation; the idle share of the device (CPU: main thread)."""

    trace: tyro.conf.Positional[Path]
    """rankN_trace.json.gz, or a .json."""
    top: int = 20
    """Kernels or operations to list, the longest first."""
    json: bool = False
    """Print JSON; times are in ms per step."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.top < 1:
        sys.exit(f"summarize_trace: --top = {arguments.top}: must be positive")
    try:
        summary = summarize(read_trace(arguments.trace))
    except TraceError as error:
        sys.exit(f"summarize_trace: {error}")
    if arguments.json:
        print(json.dumps(summary.as_dict(arguments.top), indent=2))
    else:
        print(render(summary, arguments.top), end="")


if __name__ == "__main__":
    main()
