"""A whole model on GPU kernels in bf16 against the same model in fp64 with the plain references.

How much bf16 itself costs is measured, not guessed: the plain references in bf16 are the yardstick, and the GPU may be
at most SLACK times as far from the truth.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from lt2titan.kernels.backend import resolve_backend
from lt2titan.kernels.check.__main__ import limit_tuning
from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, MixersConfig, WindowConfig
from lt2titan.model.state import allocate

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SLACK = 2.0
LENGTH = 200


def config(mixer: str) -> ModelConfig:
    """The mixer and full attention in turns, two heads each, as wide as the 1.3B model's."""
    mixers = MixersConfig(
        full=FullConfig(n_heads=2, n_kv_heads=1, output_gate=True), window=WindowConfig(n_heads=2, window=33)
    )
    for sizes in (getattr(mixers, name) for name in MixersConfig.names()):
        if hasattr(sizes, "n_heads"):
            sizes.n_heads = 2
    hybrid = HybridConfig(mixer="" if mixer == "full" else "full", ratio=1)
    return ModelConfig(vocab_size=512, dim=256, n_layers=2, n_loops=2, mixer=mixer, hybrid=hybrid, mixers=mixers)


@pytest.fixture(scope="module", params=MixersConfig.names())
def models(request: pytest.FixtureRequest) -> tuple[LT2, LT2, LT2]:
    """(GPU kernels in bf16, plain references in bf16, plain references in fp64), all of the same bf16 values."""
    limit_tuning(2)
    fast = build_on_meta(config(request.param), resolve_backend("auto", CUDA))
    materialise(fast, CUDA, seed=0)
    fast.to(torch.bfloat16)
    plain, exact = (build_on_meta(config(request.param), "reference") for _ in range(2))
    plain.load_state_dict({k: v.cpu() for k, v in fast.state_dict().items()}, assign=True)
    exact.load_state_dict({k: v.cpu().double() for k, v in fast.state_dict().items()}, assign=True)
    return fast, plain, exact


def tokens(batch: int) -> torch.Tensor:
    return torch.randint(0, 512, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.detach().double().cpu() - expected).norm() / expected.norm())


@torch.no_grad()
def check(fast: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    ours, yardstick = error(fast, exact), error(plain, exact)
    assert ours < SLACK * yardstick and yardstick < 0.1, (ours, yardstick)


def test_logits_and_gradients(models: tuple[LT2, LT2, LT2]) -> None:
    x = tokens(2)
    check(*(m(x.to(m.embedding.weight.device)) for m in models))
    for model in models:
        on_device = x.to(model.embedding.weight.device)
        model.zero_grad()
        model(on_device, targets=on_device).backward()
    fast, plain, exact = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models)
    assert fast.keys() == exact.keys()
    errors = {n: (error(fast[n], exact[n]), error(plain[n], exact[n])) for n in exact}
    # Gradients of a few numbers (A_log, dt_bias) are luckier or unluckier than those of matrices.
    bad = {n: e for n, e in errors.items() if e[0] > 2 * SLACK * e[1] + 0.01}
    assert not bad, bad


def test_packed_documents(models: tuple[LT2, LT2, LT2]) -> None:
    x = tokens(2)
    ends = torch.tensor([0, 1, 70, 199, 200, 264, 400, 400], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in ends.diff().tolist()]).view(2, -1)

    def packed(model: LT2) -> torch.Tensor:
        place = model.embedding.weight.device
        return model(
            x.to(place),
            positions=positions.to(place),
            cu_seqlens=ends.to(place),
            chunk_indices=make_chunk_indices(ends).to(place),
            max_seqlen=LENGTH,
        ).reshape(400, -1)

    fast, plain, exact = models
    alone = [exact(piece) for piece in x.reshape(1, -1).split([n for n in ends.diff().tolist() if n], dim=1)]
    check(packed(fast), packed(plain), torch.cat(alone, dim=1)[0])


@torch.no_grad()
def test_prefill_of_unequal_prompts_and_decode(models: tuple[LT2, LT2, LT2]) -> None:
    """Three sequences, read in two packed passes (the second skips one of them), then token by token."""
    x = tokens(3)[:, :90]
    passes = [(70, 1, 5), (6, 0, 66)]
    lengths = [sum(n) for n in zip(*passes, strict=True)]

    def decoded(model: LT2) -> torch.Tensor:
        weight = model.embedding.weight
        state = allocate(model, 3, 90, weight.dtype, weight.device)
        read = [0, 0, 0]
        for counts in passes:
            packed = torch.cat([x[i, read[i] : read[i] + n] for i, n in enumerate(counts)])
            ends = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
            chunks = make_chunk_indices(ends).to(weight.device)
            model(packed[None].to(weight.device), state=state, cu_seqlens=ends, chunk_indices=chunks)
            read = [start + n for start, n in zip(read, counts, strict=True)]
        steps = []
        for t in range(6):
            token = torch.stack([x[i, n + t] for i, n in enumerate(lengths)])[:, None]
            steps.append(model(token.to(weight.device), state=state))
        return torch.cat(steps, dim=1)

    fast, plain, exact = models
    alone = torch.cat([exact(x[i : i + 1, : n + 6])[:, n:] for i, n in enumerate(lengths)])
    check(decoded(fast), decoded(plain), alone)


@torch.no_grad()
def test_prefill_and_decode(models: tuple[LT2, LT2, LT2]) -> None:
    x = tokens(2)[:, :80]

    def decoded(model: LT2) -> torch.Tensor:
        weight = model.embedding.weight
        state = allocate(model, 2, 80, weight.dtype, weight.device)
        pieces = [model(piece, state=state) for piece in x.to(weight.device).split([70] + [1] * 10, dim=1)]
        return torch.cat(pieces, dim=1)

    fast, plain, exact = models
    check(decoded(fast), decoded(plain), exact(x))
