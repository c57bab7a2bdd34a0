"""Curves of one or several runs from their `metrics.jsonl`: loss, gradient norms and what each loop does."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lt2titan.metrics.metrics_logger import METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger("lt2titan")


class PlotError(ValueError):
    """Nothing can be drawn; the message names the run and the way out."""


class Curve(NamedTuple):
    """Values over steps; nan where the record had none (null stands for what was not finite)."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """One run's figures by name, those of training and of validation together: no name is used by both."""

    name: str
    curves: dict[str, Curve] = field(default_factory=dict)

    def loops(self, family: str) -> list[int]:
        """The loops t for which there is a curve ``family/loop_t``, in order."""
        matches = (re.fullmatch(rf"{family}/loop_(\d+)", name) for name in self.curves)
        return sorted(int(match[1]) for match in matches if match)


class _Panel(NamedTuple):
    title: str
    curves: tuple[tuple[str, str, str], ...] = ()  # (name, label, line style)
    family: str = ""  # or one curve per loop
    is_log: bool = False


_PANELS = [
    _Panel("loss, nats per token", (("loss", "training", "-"), ("validation_loss", "validation", "--"))),
    _Panel(
        "gradient norm before clipping",
        (("grad_norm", "total", "-"), ("grad_norm/core", "core", "--"), ("grad_norm/rest", "rest", ":")),
        is_log=True,
    ),
    _Panel("residual RMS of h(t)", family="residual_rms", is_log=True),
    _Panel("relative update |h(t) - h(t-1)| / |h(t-1)|", family="relative_update", is_log=True),
    _Panel("mean |rho_t|", family="rho"),
    _Panel("exit loss after loop t, nats per token", family="exit_loss"),
    _Panel("attention mass on the first token", family="first_token_mass"),
]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in ``paths``, run folders or metrics files; named by folder, or by path where folders share a name.

    Raises:
        PlotError: there is no metrics file, or no record in it.
    """
    short = [path.resolve().name if path.is_dir() else path.resolve().parent.name for path in paths]
    names = [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
    return [Run(name, _read_curves(path)) for name, path in zip(names, paths, strict=True)]


def _read_curves(path: Path) -> dict[str, Curve]:
    file = path / METRICS_FILE if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise PlotError(f"cannot read {file}: {error.strerror}; give run folders (job.dump_folder)") from error
    curves: dict[str, Curve] = {}
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            logger.warning("%s: line %d cannot be read and is left out", file, number)
            continue
        step = record.pop("step")
        for name, value in record.items():
            curve = curves.setdefault(name, Curve([], []))
            curve.steps.append(step)
            curve.values.append(math.nan if value is None else value)
    if not curves:
        raise PlotError(f"{file} holds no record yet: wait for the run's first logged step")
    return curves


def _record(line: str) -> dict[str, Any] | None:
    """A line's record; None if it is torn (a run may be writing it) or is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def draw(runs: Sequence[Run]) -> Figure:
    """A figure with one panel for each kind of curve that any of ``runs`` has.

    One run: loops differ by colour. Several: runs differ by colour, loops by its shade, from pale to full.

    Raises:
        PlotError: no run has a curve to draw, or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(f"drawing needs matplotlib ({error}): pip install matplotlib") from error
    panels = [panel for panel in _PANELS if any(_lines(panel, run) for run in runs)]
    if not panels:
        raise PlotError("no run has a loss, a gradient norm or a figure per loop")
    n_rows = -(-len(panels) // 2)
    figure = Figure(figsize=(13, 3.6 * n_rows), layout="constrained")
    for number, panel in enumerate(panels, start=1):
        _fill(figure.add_subplot(n_rows, min(len(panels), 2), number), panel, runs)
    return figure


def _lines(panel: _Panel, run: Run) -> list[tuple[Curve, str, str, float]]:
    """(curve, label, line style, place in the family from 0 to 1) of what ``run`` has for ``panel``."""
    loops = run.loops(panel.family) if panel.family else []
    named = [(run.curves[n], label, style, 1.0) for n, label, style in panel.curves if n in run.curves]
    return named + [(run.curves[f"{panel.family}/loop_{t}"], f"loop {t}", "-", t / max(loops)) for t in loops]


def _fill(axes: Axes, panel: _Panel, runs: Sequence[Run]) -> None:
    import matplotlib

    for number, run in enumerate(runs):
        for curve, label, style, place in _lines(panel, run):
            color: Any = f"C{number % 10}"
            if panel.family and len(runs) == 1:
                color = matplotlib.colormaps["viridis"](0.9 * place)
            axes.plot(
                curve.steps,
                curve.values,
                linestyle=style,
                # A gap on either side of a point leaves no line to see.
                marker="." if len(curve.steps) < 100 else None,
                color=color,
                alpha=0.25 + 0.75 * place if len(runs) > 1 else 1.0,
                label=label if len(runs) == 1 else f"{run.name}: {label}",
            )
    if panel.is_log:
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=1 if len(axes.lines) <= 8 else 2)
