"""The CUDA paths of the operators: errors against fp64 (as `python -m lt2titan.kernels.check`), opcheck, no waiting.

pytest tests/gpu/test_kernels_cuda.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from lt2titan.kernels.backend import resolve_backend
from lt2titan.kernels.check.__main__ import check, limit_tuning
from lt2titan.kernels.check.case import Case
from lt2titan.kernels.check.cases import OPERATORS, cases_of
from lt2titan.kernels.check.recurrences import RECURRENCES, Draw, Sizes
from lt2titan.kernels.gated_rms_norm import _gated_rms_norm, gated_rms_norm
from lt2titan.kernels.nsa import (
    _compressed,
    _select,
    _selected,
    block_layout,
    compress,
    compressed_attention,
    select_blocks,
    selected_attention,
)
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
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name.startswith("kda"):
        # What KDA keeps for its backward pass has entries that are never written, nor read: no two runs agree in them.
        checks.remove("test_aot_dispatch_dynamic")
    torch.library.opcheck(RECURRENCES[name].operator.op, args, test_utils=checks)


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


def nsa_step(length: int, cu_seqlens_k: torch.Tensor | None = None, n_before: int = 0) -> Callable[[], None]:
    """Forward and backward of both branches, 16 heads on one of 128 channels; the first tokens have no query."""
    generator = torch.Generator(CUDA).manual_seed(0)
    q, k, v = (
        torch.randn(1, n_tokens, n, 128, device=CUDA, dtype=BF16, generator=generator, requires_grad=True)
        for n_tokens, n in ((length - n_before, 16), (length, 1), (length, 1))
    )
    options = {"block_size": 64, "backend": "fla"}
    cu_seqlens = None if cu_seqlens_k is None else (cu_seqlens_k - n_before).clamp(min=0)

    def step() -> None:
        of_keys = {"length_k": length, "cu_seqlens_k": cu_seqlens_k}
        layout = block_layout(1, length - n_before, 64, cu_seqlens, CUDA, **of_keys)
        k_cmp, v_cmp = compress(k, layout, 64), compress(v, layout, 64)
        compressed, lse = compressed_attention(q, k_cmp, v_cmp, layout, **options)
        with torch.no_grad():
            blocks = select_blocks(q, k_cmp, lse, layout, n_blocks=16, **options)
        selected = selected_attention(q, k, v, blocks, layout, **options)
        torch.autograd.grad((compressed + selected).sum(), [q, k, v])

    return step


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n_before", [0, 1000])
def test_nsa_does_not_synchronise(packed: bool, n_before: int) -> None:
    cu_seqlens = torch.tensor([0, 1, 1500, 3000, 3000], dtype=torch.int32, device=CUDA)
    step = nsa_step(3000, cu_seqlens if packed else None, n_before)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_nsa_grows_with_the_length() -> None:
    peaks = []
    for length in (1 << 15, 1 << 17):
        step = nsa_step(length)
        step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del step
    assert peaks[1] < 4.2 * peaks[0], peaks


def test_opcheck_of_nsa() -> None:
    q = torch.randn(200, 16, 64, device=CUDA, dtype=BF16, requires_grad=True)
    k = torch.randn(200, 1, 64, device=CUDA, dtype=BF16, requires_grad=True)
    layout = block_layout(1, 200, 64, torch.tensor([0, 5, 200, 200], dtype=torch.int32, device=CUDA), CUDA)
    k_cmp = compress(k[None], layout, 64).detach().requires_grad_()
    _, lse = _compressed(q, k_cmp, k_cmp, *layout, 64, 0.125, "fla")
    blocks = _select(q, k_cmp, lse, *layout, 64, 3, 0.125, "fla")
    torch.library.opcheck(_compressed, (q, k_cmp, k_cmp.detach(), *layout, 64, 0.125, "fla"))
    torch.library.opcheck(_select, (q.detach(), k_cmp.detach(), lse.detach(), *layout, 64, 3, 0.125, "fla"))
    torch.library.opcheck(_selected, (q, k, k.detach(), blocks, *layout, 64, 0.125, "fla"))
