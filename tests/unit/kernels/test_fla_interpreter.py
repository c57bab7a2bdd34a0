"""The wrappers around fla's Triton kernels, on a CPU in Triton's interpreter:

    TRITON_INTERPRET=1 pytest tests/unit/kernels/test_fla_interpreter.py

The variable must be set before anything imports triton, and would slow down every other use of it, so `make test` runs
this file on its own. Needs triton and flash-linear-attention, which the dev extra has on Linux.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1 to run fla's kernels on the CPU", allow_module_level=True)
if _missing := [name for name in ("triton", "fla", "einops") if importlib.util.find_spec(name) is None]:
    pytest.skip(f"not installed: {_missing}", allow_module_level=True)

import triton_interpreter

from lt2titan.kernels.check.cases import Case, errors_of
from lt2titan.kernels.check.recurrences import RECURRENCES, Draw, Sizes
from lt2titan.kernels.gated_rms_norm import _gated_rms_norm
from lt2titan.kernels.short_convolution import _short_convolution

triton_interpreter.install()

FP32 = torch.float32
CONVOLUTION = {"D": 6, "W": 4}


def recurrence_cases() -> Iterator[Case]:
    for name, check in RECURRENCES.items():
        case = Case(name, FP32, sizes=Sizes(1, 2 if check.grouped_values else 1, 16, 8), state=True)
        yield replace(case, what="dense", batch=2, length=67)
        yield replace(case, what="one token", batch=2, length=1)
        yield replace(case, what="packed", documents=(1, 66, 3, 64, 0, 0))
        stretch = case.sizes._replace(V=24)
        yield replace(case, what="packed, wide values", documents=(0, 0, 66, 0, 3, 0), sizes=stretch)
        yield replace(case, what="chunks found on the device", documents=(5, 0, 2), host_chunks=False)
        yield replace(case, what="decode", batch=2, length=3, decode=True)
        yield replace(case, what="decay near 0", length=20, decay="near_zero", state=False)


CASES = [
    *recurrence_cases(),
    Case("short_convolution", FP32, "dense", batch=2, length=67, state=True, options=CONVOLUTION),
    Case("short_convolution", FP32, "one token", batch=2, length=1, state=True, options={**CONVOLUTION, "bias": True}),
    Case("short_convolution", FP32, "no activation", length=2, options={**CONVOLUTION, "activation": ""}),
    Case("short_convolution", FP32, "packed", documents=(1, 66, 2, 0, 3, 0), state=True, options=CONVOLUTION),
    Case("short_convolution", FP32, documents=(1, 4), state=True, host_chunks=False, options={"D": 6, "W": 3}),
    Case("gated_rms_norm", FP32, batch=2, length=5, options={"H": 2, "D": 12, "activation": "silu"}),
    Case("gated_rms_norm", FP32, length=3, options={"H": 1, "D": 520, "activation": "sigmoid"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_definition(case: Case) -> None:
    errors = errors_of(case, "cpu", "fla")
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", RECURRENCES)
def test_refilled_boundaries_are_read_anew(name: str) -> None:
    """fla remembers what it derived from a cu_seqlens object; a loader may fill the same buffer for every batch."""
    operator = RECURRENCES[name].operator
    inputs = [x.float() for x in RECURRENCES[name].inputs(Draw(1, 70, Sizes(1, 1, 16, 8)))]
    cu_seqlens = torch.tensor([0, 1, 70, 70], dtype=torch.int32)
    for second in (1, 66, 3):
        cu_seqlens[1] = second
        results = [
            operator(
                *inputs,
                scale=None,
                initial_state=None,
                cu_seqlens=cu_seqlens,
                chunk_indices=None,
                return_final_state=True,
                backend=backend,
            )
            for backend in ("fla", "reference")
        ]
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", RECURRENCES)
def test_opcheck_of_recurrences(name: str) -> None:
    inputs = [x.float().requires_grad_() for x in RECURRENCES[name].inputs(Draw(1, 5, Sizes(1, 1, 16, 8)))]
    state = torch.randn(1, 1, 16, 8, requires_grad=True)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name.startswith("kda"):
        checks.remove("test_aot_dispatch_dynamic")  # compares what is saved: half of fla's scores is never written
    args = (*inputs, state, None, None, 0.25, True, False, "fla")
    torch.library.opcheck(RECURRENCES[name].operator.op, args, test_utils=checks)


def test_opcheck_of_the_others() -> None:
    x = torch.randn(1, 5, 6, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    torch.library.opcheck(_short_convolution, (x, weight, None, None, None, None, "silu", True, "fla"))
    torch.library.opcheck(_gated_rms_norm, (x, x.detach(), torch.ones(6, requires_grad=True), 1e-5, "silu", "fla"))
