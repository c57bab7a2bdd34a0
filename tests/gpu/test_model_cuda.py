"""A whole model on GPU kernels in bf16 against the same model in fp64 with the plain references."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from lt2titan.kernels.backend import resolve_backend
from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, GDNConfig, MixersConfig, WindowConfig
from lt2titan.model.state import allocate

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
TOLERANCE = 3e-2  # eight blocks deep in bf16, whose unit is 4e-3
LENGTH = 200


def config(rare: str) -> ModelConfig:
    """Heads as wide as the 1.3B model's (96 / 192 and 128)."""
    return ModelConfig(
        vocab_size=512,
        dim=256,
        n_layers=4,
        n_loops=2,
        hybrid=HybridConfig(mixer=rare, ratio=1),
        mixers=MixersConfig(
            full=FullConfig(n_heads=2, n_kv_heads=1, output_gate=True),
            window=WindowConfig(n_heads=2, window=33),
            gdn=GDNConfig(n_heads=2),
        ),
    )


@pytest.fixture(scope="module", params=["full", "window"])
def models(request: pytest.FixtureRequest) -> tuple[LT2, LT2]:
    """(on the GPU in bf16, on the CPU in fp64), of the same bf16 values."""
    fast = build_on_meta(config(request.param), resolve_backend("auto", CUDA))
    materialise(fast, CUDA, seed=0)
    fast.to(torch.bfloat16)
    exact = build_on_meta(config(request.param), "reference")
    exact.load_state_dict({k: v.double().cpu() for k, v in fast.state_dict().items()}, assign=True)
    return fast, exact


def tokens(batch: int) -> torch.Tensor:
    return torch.randint(0, 512, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double().cpu() - expected).norm() / expected.norm())


def test_logits_and_gradients(models: tuple[LT2, LT2]) -> None:
    fast, exact = models
    x = tokens(2)
    assert error(fast(x.to(CUDA)), exact(x)) < TOLERANCE
    fast(x.to(CUDA), targets=x.to(CUDA)).backward()
    exact(x, targets=x).backward()
    expected = dict(exact.named_parameters())
    errors = {name: error(p.grad, expected[name].grad) for name, p in fast.named_parameters() if p.grad is not None}
    fast.zero_grad()
    exact.zero_grad()
    # The decay's parameters get the most cancelling of all gradients.
    bad = {n: e for n, e in errors.items() if e > (0.3 if "A_log" in n or "dt_bias" in n or "a_proj" in n else 0.1)}
    assert not bad, bad


def test_packed_documents(models: tuple[LT2, LT2]) -> None:
    fast, exact = models
    x = tokens(2)
    ends = torch.tensor([0, 1, 70, 199, 200, 264, 400, 400], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in ends.diff().tolist()]).view(2, -1)
    logits = fast(
        x.to(CUDA),
        positions=positions.to(CUDA),
        cu_seqlens=ends.to(CUDA),
        chunk_indices=make_chunk_indices(ends).to(CUDA),
        max_seqlen=LENGTH,
    ).reshape(400, -1)
    flat = x.reshape(1, -1)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        if end > start:
            assert error(logits[start:end], exact(flat[:, start:end])[0]) < TOLERANCE


@torch.no_grad()
def test_prefill_and_decode(models: tuple[LT2, LT2]) -> None:
    fast, exact = models
    x = tokens(2)[:, :80]
    state = allocate(fast, 2, 80, torch.bfloat16, CUDA)
    pieces = [fast(piece, state=state) for piece in x.to(CUDA).split([70] + [1] * 10, dim=1)]
    assert error(torch.cat(pieces, dim=1), exact(x)) < TOLERANCE
