"""DSA on a GPU: no waiting, memory that grows as the row does, and bits that repeat where they are asked to.

pytest tests/gpu/test_dsa_cuda.py     (errors against fp64: python -m lt2titan.kernels.check --operators dsa dsa_select)
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from lt2titan.kernels.dsa import dsa_attention, dsa_indexer_kl, dsa_select

pytestmark = pytest.mark.gpu
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def draw(length: int) -> tuple[list[Tensor], list[Tensor]]:
    """The indexer's inputs and attention's, at the 1.3B model's sizes."""
    shapes = [[(8, 64), (64,), (8,)], [(16, 128), (1, 128), (1, 128)]]
    generator = torch.Generator("cuda").manual_seed(0)
    index, tokens = (
        [torch.randn(1, length, *shape, generator=generator, **BF16).requires_grad_() for shape in group]
        for group in shapes
    )
    return index, tokens


def step(index: list[Tensor], tokens: list[Tensor], bounds: Tensor | None = None, top_k: int = 2048) -> list[Tensor]:
    """Forward and backward of all operators; the gradients."""
    indices = dsa_select(*index, top_k=top_k, forced_first=True, forced_local=64, cu_seqlens=bounds, backend="fla")
    o, lse = dsa_attention(*tokens, indices, backend="fla")
    kl = dsa_indexer_kl(*index, *tokens[:2], indices=indices, lse=lse, backend="fla")
    return list(torch.autograd.grad(o.float().square().sum() + kl, [*index, *tokens]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n_before", [0, 300])
def test_no_synchronisation(packed: bool, n_before: int) -> None:
    """Nor with keys of earlier tokens that have no query here."""
    index, tokens = draw(700)
    (q_index, k_index, w), (q, k, v) = index, tokens
    index, tokens = [q_index[:, n_before:], k_index, w[:, n_before:]], [q[:, n_before:], k, v]
    bounds = torch.tensor([0, 1, 400, 700, 700], dtype=torch.int32, device="cuda") if packed else None

    def both_phases() -> None:
        step(index, tokens, bounds, top_k=256)
        dsa_indexer_kl(*index, *tokens[:2], cu_seqlens=bounds, backend="fla").backward()

    both_phases()  # compiling does synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_phases()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_grows_as_the_row_does() -> None:
    """A row of L x L scores would be 4 GiB at 32k and 64 GiB at 128k; the workspace is constant."""
    peaks = []
    for length in (32_768, 131_072):
        index, tokens = draw(length)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(index, tokens)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 4.2 * peaks[0], peaks


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_asked_to_be_deterministic_it_is(deterministic: None) -> None:
    """And agrees with atomics but for rounding: the same sum may round to neighbours, 2^-8 of it apart in bf16."""
    index, tokens = draw(5000)
    one, other = (step(index, tokens) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    torch.use_deterministic_algorithms(False)
    for a, b in zip(one, step(index, tokens), strict=True):
        assert (a.float() - b.float()).norm() <= 2**-8 * a.float().norm()
