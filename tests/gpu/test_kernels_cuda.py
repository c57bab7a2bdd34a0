"""The CUDA paths of the operators: errors against fp64 (as `python -m lt2titan.kernels.check`), opcheck, no waiting.

pytest tests/gpu/test_kernels_cuda.py
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from lt2titan.kernels.backend import resolve_backend
from lt2titan.kernels.check.__main__ import check, limit_tuning
from lt2titan.kernels.check.cases import OPERATORS, Case, cases_of
from lt2titan.kernels.check.recurrences import RECURRENCES, Draw, Sizes
from lt2titan.kernels.gated_rms_norm import _gated_rms_norm, gated_rms_norm
from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.kernels.short_convolution import _short_convolution, short_convolution

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32
SMALL = Sizes(1, 1, 32, 32)
CASES = [case for operator in OPERATORS for dtype in (BF16, FP32) for case in cases_of(operator, dtype, "fla")]


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    assert resolve_backend("auto", CUDA) == "fla"
    limit_tuning(2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_fp64(case: Case) -> None:
    result = check(case, CUDA, "fla")
    assert result["passed"], result


def bf16_inputs(name: str, length: int) -> list[torch.Tensor]:
    operator = RECURRENCES[name].operator
    tensors = RECURRENCES[name].inputs(Draw(1, length, SMALL))
    precise = ("g", "beta")
    return [
        x.to(CUDA, FP32 if input_name in precise else BF16).requires_grad_()
        for input_name, x in zip(operator.input_names, tensors, strict=True)
    ]


@pytest.mark.parametrize("name", RECURRENCES)
def test_opcheck_of_recurrences(name: str) -> None:
    state = torch.randn(1, 1, 32, 32, device=CUDA, requires_grad=True)
    args = (*bf16_inputs(name, 70), state, None, None, 0.1, True, False, "fla")
    torch.library.opcheck(RECURRENCES[name].operator.op, args)


def test_opcheck_of_the_others() -> None:
    cu_seqlens = torch.tensor([0, 5, 70, 70], dtype=torch.int32)
    chunks = make_chunk_indices(cu_seqlens).to(CUDA)
    x = torch.randn(1, 70, 192, device=CUDA, dtype=BF16, requires_grad=True)
    weight = torch.randn(192, 4, device=CUDA, dtype=BF16, requires_grad=True)
    args = (x, weight, None, None, cu_seqlens.to(CUDA), chunks, "silu", False, "fla")
    torch.library.opcheck(_short_convolution, args)
    gain = torch.ones(192, device=CUDA, dtype=BF16, requires_grad=True)
    torch.library.opcheck(_gated_rms_norm, (x, x.detach(), gain, 1e-5, "silu", "fla"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", RECURRENCES)
def test_no_synchronisation(name: str, packed: bool) -> None:
    """Neither dense rows nor packed documents with host-made chunks make the host wait, forward and backward."""
    inputs = bf16_inputs(name, 150)
    packing: dict[str, torch.Tensor | None] = {"cu_seqlens": None, "chunk_indices": None}
    if packed:
        cu_seqlens = torch.tensor([0, 1, 100, 150, 150], dtype=torch.int32)
        packing = {"cu_seqlens": cu_seqlens.to(CUDA), "chunk_indices": make_chunk_indices(cu_seqlens).to(CUDA)}
    weight = torch.randn(32, 4, device=CUDA, dtype=BF16, requires_grad=True)
    gain = torch.ones(32, device=CUDA, dtype=BF16, requires_grad=True)

    def step() -> None:
        q, *rest = inputs
        x, _ = short_convolution(q.flatten(2), weight, backend="fla", **packing)
        o, _ = RECURRENCES[name].operator(
            x.view_as(q),
            *rest,
            scale=None,
            initial_state=None,
            return_final_state=False,
            backend="fla",
            **packing,
        )
        gated_rms_norm(o, rest[1], gain, eps=1e-5, backend="fla").sum().backward()

    step()  # compiling and autotuning do synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
