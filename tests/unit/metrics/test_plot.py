"""The figure itself: which curves stand in which panel, with which points, labels and axes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from lt2titan.metrics.jsonl import JsonlSink
from lt2titan.metrics.plot import PlotError, draw, read_runs
from lt2titan.metrics.record import TrainingRecord, ValidationRecord

N_LOOPS = 3


def write_run(folder: Path, steps: int = 6, *, diagnosed: bool = True, nan_step: int = 0, offset: float = 0.0) -> Path:
    sink = JsonlSink(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        extra: dict[str, float] = {}
        if diagnosed:
            extra = {"grad_norm/core": 3.0 * step, "grad_norm/rest": 4.0 * step}
            for t in range(1, N_LOOPS + 1):
                extra |= {f"residual_rms/loop_{t}": 10.0 * t + step, f"rho/loop_{t}": t / 100}
                extra[f"relative_update/loop_{t}"] = 1 / t
        loss = math.nan if step == nan_step else 5 - step / 10 + offset
        sink.write(
            TrainingRecord(
                step=step,
                loss=loss,
                grad_norm=5.0 * step,
                lr=1e-3,
                loops=4,
                tokens_per_second=1.0,
                tokens_seen=step,
                mfu=None,
                tflops=0.0,
                memory_gib=0.0,
                data_wait_fraction=0.0,
                skipped_steps=0,
                extra=extra,
            )
        )
        if step % 3 == 0:
            names = ("exit_loss", "first_token_mass") if diagnosed else ()
            seen = {f"{name}/loop_{t}": step / t for name in names for t in range(1, N_LOOPS + 1)}
            sink.write(ValidationRecord(step=step, validation_loss=6 + offset, bits_per_byte=1.0, extra=seen))
    sink.close(failed=False)
    return folder


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title().split(",")[0]: axes for axes in figure.axes}


def points(axes: Axes, label: str) -> list[tuple[float, float]]:
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def labels(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [line.get_label() for line in axes.lines]
    return [str(line.get_label()) for line in axes.lines]


def test_one_run_shows_every_curve(tmp_path: Path) -> None:
    drawn = panels(draw(read_runs([write_run(tmp_path / "run")])))
    per_loop = {
        "residual RMS of h(t)": lambda t: [(s, 10 * t + s) for s in range(1, 7)],
        "relative update |h(t) - h(t-1)| / |h(t-1)|": lambda t: [(s, 1 / t) for s in range(1, 7)],
        "mean |rho_t|": lambda t: [(s, t / 100) for s in range(1, 7)],
        "exit loss after loop t": lambda t: [(3, 3 / t), (6, 6 / t)],
        "attention mass on the first token": lambda t: [(3, 3 / t), (6, 6 / t)],
    }
    assert list(drawn) == ["loss", "gradient norm before clipping", *per_loop]
    loss, norms = drawn["loss"], drawn["gradient norm before clipping"]
    assert labels(loss) == ["training", "validation"]
    assert points(loss, "training") == [(s, 5 - s / 10) for s in range(1, 7)]
    assert points(loss, "validation") == [(3, 6), (6, 6)]
    assert labels(norms) == ["total", "core", "rest"]
    for label, slope in (("total", 5.0), ("core", 3.0), ("rest", 4.0)):
        assert points(norms, label) == [(s, slope * s) for s in range(1, 7)]
    for title, expected in per_loop.items():
        assert labels(drawn[title]) == ["loop 1", "loop 2", "loop 3"]
        for t in (1, 2, 3):
            assert points(drawn[title], f"loop {t}") == expected(t), title
        assert len({to_rgba(line.get_color()) for line in drawn[title].lines}) == 3
    log = {title for title, axes in drawn.items() if axes.get_yscale() == "log"}
    assert log == {"gradient norm before clipping", *list(per_loop)[:2]}
    assert all(axes.get_xlabel() == "step" for axes in drawn.values())


def test_several_runs_share_panels_with_or_without_diagnostics(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "with"), write_run(tmp_path / "without", diagnosed=False, offset=1.0)]
    drawn = panels(draw(read_runs(runs)))
    assert labels(drawn["loss"]) == [f"{run}: {what}" for run in ("with", "without") for what in LOSSES]
    assert points(drawn["loss"], "without: training") == [(s, pytest.approx(6 - s / 10)) for s in range(1, 7)]
    assert labels(drawn["gradient norm before clipping"])[-1] == "without: total"
    rms = drawn["residual RMS of h(t)"]
    assert labels(rms) == ["with: loop 1", "with: loop 2", "with: loop 3"]
    by_run = {str(line.get_label()).split(":")[0]: line.get_color() for line in drawn["loss"].lines}
    assert by_run["with"] != by_run["without"]
    assert {line.get_color() for line in rms.lines} == {by_run["with"]}
    shades = [line.get_alpha() for line in rms.lines]
    assert shades == sorted(shades) and len(set(shades)) == 3 and shades[-1] == 1.0


LOSSES = ("training", "validation")


def test_panels_that_no_run_has_are_left_out(tmp_path: Path) -> None:
    drawn = panels(draw(read_runs([write_run(tmp_path / "run", steps=2, diagnosed=False)])))
    assert list(drawn) == ["loss", "gradient norm before clipping"]
    assert labels(drawn["loss"]) == ["training"]  # no validation yet


def test_loops_are_in_order_of_number(tmp_path: Path) -> None:
    values = {f"rho/loop_{t}": float(t) for t in (11, 2, 1, 10)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0} | values) + "\n")
    drawn = panels(draw(read_runs([tmp_path])))
    assert labels(drawn["mean |rho_t|"]) == ["loop 1", "loop 2", "loop 10", "loop 11"]


def test_what_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    figure = draw(read_runs([write_run(tmp_path / "run", nan_step=3)]))
    line = panels(figure)["loss"].lines[0]
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert np.isnan(line.get_ydata()).tolist() == [False, False, True, False, False, False]
    assert line.get_marker() == "."  # a lone point between gaps is seen
    figure.savefig(tmp_path / "gap.png")


def test_a_run_of_nothing_finite_is_drawn_all_the_same(tmp_path: Path) -> None:
    lines = [{"step": s, "loss": None, "grad_norm": None, "residual_rms/loop_1": None} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = draw(read_runs([tmp_path]))
    figure.savefig(tmp_path / "empty.png")
    assert len(figure.axes) == 3


@pytest.mark.parametrize("torn", ['{"step": 7, "lo', "null", '{"loss": 1.0}', "[1]", '\udcff{"step'])
def test_a_torn_line_is_left_out_and_said(tmp_path: Path, torn: str, caplog: pytest.LogCaptureFixture) -> None:
    file = write_run(tmp_path / "run") / "metrics.jsonl"
    n_lines = len(file.read_text().splitlines())
    with file.open("ab") as handle:
        handle.write(torn.encode(errors="surrogateescape"))
    (run,) = read_runs([file.parent])
    assert run.curves["loss"].steps == [1, 2, 3, 4, 5, 6]
    assert f"line {n_lines + 1} cannot be read" in caplog.text


def test_names_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = (write_run(tmp_path / name) for name in ("a/run", "b/run", "c"))
    file = three / "metrics.jsonl"
    assert [run.name for run in read_runs([one, two, file])] == [str(one), str(two), "c"]
    monkeypatch.chdir(three)
    assert [run.name for run in read_runs([Path(".")])] == ["c"]


def test_errors_name_the_file_and_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlotError, match=r"missing.*No such file.*give run folders"):
        read_runs([tmp_path / "missing"])
    with pytest.raises(PlotError, match=r"metrics\.jsonl: No such file"):
        read_runs([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(PlotError, match=r"metrics\.jsonl holds no record yet"):
        read_runs([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    with pytest.raises(PlotError, match="no run has a loss"):
        draw(read_runs([tmp_path]))
    blocked: Any = None  # what Python takes for a blocked import
    monkeypatch.setitem(sys.modules, "matplotlib.figure", blocked)
    with pytest.raises(PlotError, match="pip install matplotlib"):
        draw(read_runs([write_run(tmp_path / "run")]))
