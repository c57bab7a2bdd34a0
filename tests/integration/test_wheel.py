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


def source_files(*folders: str) -> list[str]:
    """What git tracks or would track in ``folders`` (all of them by default), relative to the checkout."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *folders, cwd=ROOT).splitlines()
    return [name for name in listed if os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the source files, so that neither old builds nor ignored files get in."""
    source = tmp_path_factory.mktemp("source")
    for name in source_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {name for name in source_files("kernels", "lt2titan") if not (ROOT / name).is_symlink()}
    expected = {"lt2titan/" + name if name.startswith("kernels/") else name for name in files}
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

    def python(*arguments: str) -> str:
        return run(sys.executable, *arguments, cwd=elsewhere, PYTHONPATH=str(target))

    origin = python("-c", "import lt2titan; print(lt2titan.__file__)")
    assert origin.strip() == str(target / "lt2titan" / "__init__.py")
    printed = python("-m", "lt2titan.config", *config, "--job.print_config")
    assert 'dump_folder = "run"' in printed and "steps = 2\n" in printed
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    python(*launcher, "-m", "lt2titan.train", *config)
    assert len(losses(elsewhere / "run")) == 2
