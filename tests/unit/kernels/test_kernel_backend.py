from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lt2titan.config.section import ConfigError
from lt2titan.kernels import backend
from lt2titan.kernels.backend import backend_versions, fla_problem, resolve_backend
from lt2titan.kernels.config import KernelsConfig
from lt2titan.kernels.packing import make_chunk_indices

CPU = torch.device("cpu")
HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)


def install(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that these distributions are installed (or not: None); tilelang is absent."""
    monkeypatch.setattr(backend, "_version", lambda name: versions.get(name.replace("-", "_")))
    monkeypatch.setattr(backend, "_tilelang_takes_over", lambda: False)


def test_the_config_imports_without_torch() -> None:
    code = "import sys, lt2titan.kernels.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_config_refuses_an_unknown_backend() -> None:
    KernelsConfig().validate()
    with pytest.raises(ConfigError, match=r"backend = 'triton': must be one of auto, reference, fla"):
        KernelsConfig(backend="triton").validate()  # type: ignore[arg-type]


def test_on_the_cpu_auto_is_the_reference_and_fla_is_refused() -> None:
    assert resolve_backend("auto", CPU) == "reference"
    assert resolve_backend("reference", CPU) == "reference"
    with pytest.raises(ConfigError, match=r"kernels.backend = 'fla': needs a CUDA device"):
        resolve_backend("fla", CPU)
    with pytest.raises(ConfigError, match="must be one of"):
        resolve_backend("Fla", CPU)


@pytest.mark.parametrize(
    "triton, capability, safe",
    [
        ("3.3.1", HOPPER, True),
        ("3.4.0", HOPPER, False),
        ("3.6.0", HOPPER, False),
        ("3.7.0.post1", HOPPER, False),
        ("3.7.1", HOPPER, True),
        ("3.10.0", HOPPER, True),
        ("4.0.0+git1234", HOPPER, True),
        ("3.6.0", AMPERE, True),
        ("3.6.0", BLACKWELL, True),
    ],
)
def test_triton_that_miscomputes_on_hopper_is_refused(
    monkeypatch: pytest.MonkeyPatch, triton: str, capability: tuple[int, int], safe: bool
) -> None:
    install(monkeypatch, triton=triton, fla_core="0.6.0")
    problem = fla_problem(capability)
    if safe:
        assert problem == ""
    else:
        assert triton in problem and "triton>=3.7.1" in problem and "kernels.backend=reference" in problem


@pytest.mark.parametrize(
    "versions, expected",
    [
        ({"triton": "3.7.1"}, "flash-linear-attention not installed: pip install"),
        ({"fla_core": "0.6.0"}, "triton not installed: pip install"),
        ({}, "flash-linear-attention and triton not installed"),
        ({"fla_core": "0.5.1", "triton": "3.7.1"}, "flash-linear-attention 0.5.1 is not supported"),
    ],
)
def test_missing_packages_are_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], expected: str
) -> None:
    install(monkeypatch, **versions)
    problem = fla_problem(HOPPER)
    assert expected in problem and "kernels.backend=reference" in problem


def test_versions_are_reported() -> None:
    versions = backend_versions()
    assert versions["torch"] == torch.__version__ and set(versions) == {"torch", "triton", "fla"}


def test_chunk_indices_list_every_chunk_and_pad_to_a_fixed_length() -> None:
    rows = make_chunk_indices(torch.tensor([0, 1, 65, 130, 130, 259, 259]))
    expected = [(0, 0), (1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2)]
    assert rows.dtype == torch.int32 and rows.shape == (259 // 64 + 6, 2)
    assert [tuple(row) for row in rows[:7].tolist()] == expected
    assert all(document == 0 and chunk * 64 >= 259 for document, chunk in rows[7:].tolist())
    assert make_chunk_indices(torch.tensor([0, 100, 200, 259, 259, 259, 259])).shape == rows.shape


def test_chunk_indices_never_overflow_their_fixed_length() -> None:
    """As many chunks as can be: every document one token longer than whole chunks."""
    bounds = torch.tensor([1, 65, 129, 1]).cumsum(0)
    rows = make_chunk_indices(torch.nn.functional.pad(bounds, (1, 0)))
    assert [tuple(row) for row in rows[:7].tolist()] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0)]


def test_chunk_indices_need_host_data_that_rises() -> None:
    with pytest.raises(ValueError, match="on the CPU"):
        make_chunk_indices(torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="must rise from 0"):
        make_chunk_indices(torch.tensor([0, 5, 3]))
