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
from nsa_stretches import check_stretches

from lt2titan.kernels.check.case import Case
from lt2titan.kernels.check.cases import errors_of
from lt2titan.kernels.check.recurrences import RECURRENCES, Draw, Sizes
from lt2titan.kernels.gated_rms_norm import _gated_rms_norm
from lt2titan.kernels.nsa import _compressed, _select, _selected, block_layout, compress
from lt2titan.kernels.nsa import selected_triton as nsa_selected_triton
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


NSA = {"block_size": 16, "n_blocks": 4}

CASES = [
    Case("nsa", FP32, "dense, odd heads", Sizes(6, 2, 20, 20), batch=2, length=101, options=NSA),
    Case("nsa", FP32, "three blocks of three", Sizes(2, 1, 16, 16), length=130, options={**NSA, "n_blocks": 3}),
    Case("nsa", FP32, "one token", batch=2, length=1, options=NSA),
    Case("nsa", FP32, "blocks in parts", Sizes(3, 1, 72, 72), length=131, options={"block_size": 64, "n_blocks": 3}),
    Case("nsa", FP32, "packed", Sizes(16, 1, 16, 16), documents=(1, 66, 3, 64, 0, 0), options=NSA),
    Case("nsa", FP32, "earlier keys", Sizes(2, 1, 16, 16), batch=2, length=101, options={**NSA, "n_before": 40}),
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


def test_nsa_of_equally_probable_blocks_takes_the_older_as_the_reference_does() -> None:
    """Exact ties: keys of all blocks are the same but for two that are better, and one better than those."""
    k = torch.ones(1, 230, 1, 16)
    k[:, 96:128], k[:, 64:80] = 1.5, 2.0
    q = torch.ones(230, 3, 16)
    layout = block_layout(1, 230, 16, None, torch.device("cpu"))
    k_cmp = compress(k, layout, 16)
    chosen = {}
    for backend in ("reference", "fla"):
        _, lse = _compressed(q, k_cmp, k_cmp, *layout, 16, 0.25, backend)
        chosen[backend] = _select(q, k_cmp, lse, *layout, 16, 7, 0.25, backend)
    assert torch.equal(chosen["fla"], chosen["reference"])
    assert chosen["fla"][229, 0].tolist() == [
        0,
        1,
        4,
        6,
        7,
        13,
        14,
    ]  # own 14, previous 13, best 4, then 6 and 7, oldest


@pytest.mark.parametrize(("n_stretches", "packed"), [pytest.param(2, False, marks=pytest.mark.wide), (4, True)])
def test_nsa_of_stretches_of_rows_is_that_of_the_rows(n_stretches: int, packed: bool) -> None:
    check_stretches(FP32, "fla", n_stretches, packed, tolerance=1e-5)


def test_nsa_sums_long_lists_of_queries_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block is in every query's list: 12 segments and more of 8 queries each."""
    monkeypatch.setattr(nsa_selected_triton, "SHORT_SEGMENT", 8)
    case = Case("nsa", FP32, "short segments", Sizes(4, 2, 16, 16), documents=(99, 7), options=NSA)
    assert max(errors_of(case, "cpu", "fla").values()) < 1e-5


def test_opcheck_of_nsa() -> None:
    q, k = torch.randn(20, 2, 16, requires_grad=True), torch.randn(20, 1, 16, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 20, 20], dtype=torch.int32)
    layout = block_layout(1, 20, 16, cu_seqlens, torch.device("cpu"))
    k_cmp = torch.randn(layout.block_start.shape[0], 1, 16, requires_grad=True)
    _, lse = _compressed(q, k_cmp, k_cmp, *layout, 16, 0.25, "fla")
    blocks = _select(q, k_cmp, lse, *layout, 16, 3, 0.25, "fla")
    torch.library.opcheck(_compressed, (q, k_cmp, k_cmp.detach(), *layout, 16, 0.25, "fla"))
    torch.library.opcheck(_select, (q.detach(), k_cmp.detach(), lse.detach(), *layout, 16, 3, 0.25, "fla"))
    torch.library.opcheck(_selected, (q, k, k.detach(), blocks, *layout, 16, 0.25, "fla"))
