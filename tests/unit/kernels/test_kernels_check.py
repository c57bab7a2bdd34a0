"""`python -m lt2titan.kernels.check`: it passes here, and it fails when an operator is wrong or raises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lt2titan.kernels.check import __main__ as command
from lt2titan.kernels.check.case import Case
from lt2titan.kernels.check.cases import OPERATORS, cases_of, errors_of
from lt2titan.kernels.gated_delta_rule import OPERATOR


def test_every_operator_passes_on_this_device(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--dtypes", "float32", "--json", str(tmp_path / "report.json")]
    result = subprocess.run(
        [sys.executable, "-m", "lt2titan.kernels.check", *arguments], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert torch.__version__ in result.stdout and report["versions"]["torch"] == torch.__version__
    assert {case["case"].split(",")[0] for case in report["cases"]} == set(OPERATORS)
    errors = {case["case"]: max(case["errors"].values()) for case in report["cases"]}
    assert all(0 <= error < 2e-5 for error in errors.values())
    # Selections of whole numbers are exact.
    assert {name.split(",")[0] for name, error in errors.items() if error > 0} == set(OPERATORS) - {"dsa_select"}


def wrong(scale: float):  # an operator whose output is off by a factor
    def reference(inputs, initial_state, cu_seqlens, factor):
        o, final = original(inputs, initial_state, cu_seqlens, factor)
        return o * scale, final

    original = OPERATOR.reference
    return reference


@pytest.mark.parametrize("scale", [1.001, float("nan")])
def test_a_wrong_operator_fails(scale: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(OPERATOR, "reference", wrong(scale))
    arguments = ["--device", "cpu", "--dtypes", "float32", "--operators", "gated_delta_rule"]
    assert command.main(arguments) == 1
    assert "FAILED gated_delta_rule, float32, odd length" in capsys.readouterr().out.replace("\n", " ")


def test_an_operator_that_raises_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def reference(*args):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(OPERATOR, "reference", reference)
    assert command.main(["--device", "cpu", "--dtypes", "float32", "--operators", "gated_delta_rule"]) == 1
    assert "no kernel image" in capsys.readouterr().out


def test_a_wrong_gradient_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def reference(inputs, *rest):
        q, k, v, g, beta = inputs
        return original((q, k, v, g + 1e-2 * (g - g.detach()), beta), *rest)

    original = OPERATOR.reference
    monkeypatch.setattr(OPERATOR, "reference", reference)
    errors = errors_of(next(cases_of("gated_delta_rule", torch.float32, "reference")), "cpu", "reference")
    assert errors["dg"] == pytest.approx(1e-2, rel=1e-2) and errors["output"] < 1e-5


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["--operators", "gated_delta_rul"]) == 2
    assert "gated_delta_rul: there are gated_delta_rule" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command.main(["--device", "cuda"]) == 2


def test_nothing_to_check_is_not_a_success(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["--operators", "--device", "cpu"]) == 2
    assert command.main(["--dtypes", "--device", "cpu"]) == 2
    assert "nothing is checked" in capsys.readouterr().err
    assert command.main(["--json", "/no/such/folder/report.json"]) == 2
    with pytest.raises(SystemExit, match="2"):
        command.main(["--device", "cuda:0"])


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_cases_cover_what_breaks_kernels(operator: str) -> None:
    cases: list[Case] = list(cases_of(operator, torch.bfloat16, "fla"))
    lengths = {case.length for case in cases if case.length}
    assert 1 in lengths and any(n % 2 and n > 64 for n in lengths)
    assert any(case.batch > 1 for case in cases)
    if operator == "gated_rms_norm":
        return
    assert any(1 in case.documents for case in cases)
    assert any(case.decode for case in cases)
    if operator in ("dsa", "dsa_select"):
        return
    if operator not in ("attention", "nsa"):
        assert any(case.state for case in cases)
    if operator not in ("attention", "nsa", "short_convolution"):
        assert {case.decay for case in cases} == {"mixed", "near_one", "near_zero"}
        assert any(case.decode for case in cases) and any(case.sizes.H == 1 for case in cases)
