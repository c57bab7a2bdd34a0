"""The wheel holds the whole package, kernels included, and trains outside the checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from harness import ROOT, losses

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("build") is None, reason="the package build is missing: pip install '.[dev]'"
)


def run(*command: str, cwd: Path, **changes: str) -> str:
    """A command that must succeed, away from the checkout unless ``cwd`` is one; returns its output."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the source files, so that neither old builds nor ignored files get in."""
    source = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        if os.path.lexists(ROOT / name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def test_wheel_holds_every_module_as_a_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "kernels", "lt2titan", cwd=ROOT)
    sources = {name for name in modules.splitlines() if name.endswith(".py") and (ROOT / name).exists()}
    expected = {"lt2titan/" + name if name.startswith("kernels/") else name for name in sources}
    assert "lt2titan/kernels/gated_delta_rule/reference.py" in expected
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_wheel_trains_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    run(*pip, "--target", str(target), str(wheel), cwd=elsewhere)
    # The two files hang together by a relative path.
    for name in ("tests/assets/tiny.toml", "train_configs/lt2_debug.toml"):
        (elsewhere / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, elsewhere / name)
    config = ["--job.config_file", "tests/assets/tiny.toml", "--job.dump_folder", "run", "--training.steps", "2"]

    origin = run(
        sys.executable, "-c", "import lt2titan; print(lt2titan.__file__)", cwd=elsewhere, PYTHONPATH=str(target)
    )
    assert origin.strip() == str(target / "lt2titan" / "__init__.py")
    printed = run(
        sys.executable, "-m", "lt2titan.config", *config, "--job.print_config", cwd=elsewhere, PYTHONPATH=str(target)
    )
    assert 'dump_folder = "run"' in printed and "steps = 2\n" in printed
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    run(*launcher, "-m", "lt2titan.train", *config, cwd=elsewhere, PYTHONPATH=str(target))
    assert len(losses(elsewhere / "run")) == 2
