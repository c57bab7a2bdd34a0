"""The wrappers around fla's Triton kernels, on a CPU, opt-in:

    TRITON_INTERPRET=1 pytest tests/unit/kernels/test_fla_interpreter.py

The variable must be set before anything imports triton, and would slow down every other use of it. Needs triton,
flash-linear-attention and einops; half a minute on one core.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1 to run fla's kernels on the CPU", allow_module_level=True)
if _missing := [name for name in ("triton", "fla", "einops") if importlib.util.find_spec(name) is None]:
    pytest.skip(f"not installed: {_missing}", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "gpu"))
import kernel_cases
import triton_interpreter
from kernel_cases import Case

from lt2titan.kernels.gated_delta_rule import _gated_delta_rule, gated_delta_rule
from lt2titan.kernels.gated_rms_norm import _gated_rms_norm
from lt2titan.kernels.short_convolution import _short_convolution

triton_interpreter.install()

SMALL = {"H": 1, "HV": 2, "K": 16, "V": 8}
CONVOLUTION = {"D": 6, "W": 4}
CASES = [
    Case("gated_delta_rule", torch.float32, SMALL, batch=2, length=67, state=True),
    Case("gated_delta_rule", torch.float32, SMALL, batch=2, length=1, state=True),
    Case("gated_delta_rule", torch.float32, SMALL, lengths=(1, 66, 3, 64, 0, 0), state=True),
    Case("gated_delta_rule", torch.float32, SMALL, lengths=(5, 0, 2), state=True, host_chunks=False),
    Case("short_convolution", torch.float32, CONVOLUTION, batch=2, length=67, state=True),
    Case("short_convolution", torch.float32, {**CONVOLUTION, "bias": True}, batch=2, length=1, state=True),
    Case("short_convolution", torch.float32, {**CONVOLUTION, "activation": ""}, batch=1, length=2),
    Case("short_convolution", torch.float32, CONVOLUTION, lengths=(1, 66, 2, 0, 3, 0), state=True),
    Case("short_convolution", torch.float32, {"D": 6, "W": 3}, lengths=(1, 4), state=True, host_chunks=False),
    Case("gated_rms_norm", torch.float32, {"H": 2, "D": 12, "activation": "silu"}, batch=2, length=5),
    Case("gated_rms_norm", torch.float32, {"H": 1, "D": 520, "activation": "sigmoid"}, batch=1, length=3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_reference(case: Case) -> None:
    errors = kernel_cases.errors_of(case, "cpu")
    assert max(errors.values()) < 1e-5, errors


def test_recurrent_decoding_matches_the_reference() -> None:
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(2, 3, 1, 16), dim=-1) for _ in range(2))
    v, g, beta, state = torch.randn(2, 3, 2, 8), -torch.rand(2, 3, 2), torch.rand(2, 3, 2), torch.randn(2, 2, 16, 8)
    results = [
        gated_delta_rule(q, k, v, g, beta, initial_state=state, return_final_state=True, backend=backend)
        for backend in ("fla", "reference")
    ]
    torch.testing.assert_close(results[0], results[1])


def test_refilled_boundaries_are_read_anew() -> None:
    """fla remembers what it derived from a cu_seqlens object; a loader may fill the same buffer for every batch."""
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(1, 70, 1, 16), dim=-1) for _ in range(2))
    v, g, beta = torch.randn(1, 70, 2, 8), -torch.rand(1, 70, 2), torch.rand(1, 70, 2)
    cu_seqlens = torch.tensor([0, 1, 70, 70], dtype=torch.int32)
    for second in (1, 66, 3):
        cu_seqlens[1] = second
        results = [
            gated_delta_rule(q, k, v, g, beta, cu_seqlens=cu_seqlens, return_final_state=True, backend=backend)
            for backend in ("fla", "reference")
        ]
        torch.testing.assert_close(results[0], results[1])


def test_opcheck() -> None:
    x = torch.randn(1, 5, 6, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    torch.library.opcheck(_short_convolution, (x, weight, None, None, None, None, "silu", True, "fla"))
    torch.library.opcheck(_gated_rms_norm, (x, x.detach(), torch.ones(6, requires_grad=True), 1e-5, "silu", "fla"))
    q = torch.nn.functional.normalize(torch.randn(1, 5, 1, 16), dim=-1).requires_grad_()
    v, beta = torch.randn(1, 5, 2, 8, requires_grad=True), torch.rand(1, 5, 2, requires_grad=True)
    state = torch.randn(1, 2, 16, 8, requires_grad=True)
    args = (q, q.detach(), v, -beta.detach(), beta, state, None, None, 0.25, True, False, "fla")
    torch.library.opcheck(_gated_delta_rule, args)
