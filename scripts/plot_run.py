"""Loss, gradient norms and per-loop curves of one or several runs, as a PNG.

python scripts/plot_run.py outputs/run [outputs/other ...] --output runs.png
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from lt2titan.metrics.logging import init_logging
from lt2titan.metrics.plot import PlotError, draw, read_runs


@dataclass(kw_only=True)
class Arguments:
    """Curves of one or several runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders (job.dump_folder) or metrics files; several are drawn over each other."""
    output: Path = Path("plot.png")
    """The image to write; its ending chooses the format (.png, .pdf, .svg)."""
    dpi: int = 120
    """Pixels per inch; the image is 13 inches wide."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    init_logging()
    if not arguments.runs:
        sys.exit("plot_run: name at least one run folder")
    if not arguments.output.suffix:
        sys.exit(f"plot_run: --output {arguments.output} has no ending to choose the format: .png, .pdf or .svg")
    if arguments.dpi < 1:
        sys.exit(f"plot_run: --dpi = {arguments.dpi}: must be positive")
    try:
        figure = draw(read_runs(arguments.runs))
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(arguments.output, dpi=arguments.dpi)
    except (PlotError, OSError, ValueError) as error:  # matplotlib refuses a format with ValueError
        sys.exit(f"plot_run: {error}")
    print(arguments.output)


if __name__ == "__main__":
    main()
