"""DSA's Triton kernels on a CPU in Triton's interpreter, against the references:

TRITON_INTERPRET=1 pytest tests/unit/kernels/test_dsa_interpreter.py

The variable must be set before anything imports triton; `make test` runs this file on its own.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1 to run Triton kernels on the CPU", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("not installed: triton", allow_module_level=True)

import dsa_truth

from lt2titan.kernels.dsa import (
    dsa_attention,
    dsa_indexer_kl,
    dsa_select,
    inverse,
    triton_kl_dense,
    triton_scores,
    triton_select,
)
from lt2titan.kernels.dsa.operators import attend, indexer_kl, select

# Rows, queries and keys of each, and documents over the keys of all rows.
SHAPES = {
    "dense rows": (2, 43, 43, ()),
    "documents": (1, 56, 56, (7, 1, 37, 6, 5)),
    "one token": (1, 1, 1, ()),
    "later queries": (2, 21, 43, ()),
    "later queries of documents": (2, 21, 63, (50, 13, 3, 25, 35)),
}
shapes = pytest.mark.parametrize("shape", SHAPES)
SELECTIONS = [{"top_k": 4}, {"top_k": 9, "forced_first": True, "forced_local": 3}, {"top_k": 64}]


def bounds_of(shape: str) -> Tensor | None:
    documents = SHAPES[shape][3]
    return torch.tensor([0, *documents, 0]).cumsum(0).int() if documents else None


def draw(shape: str, *sizes: int, seed: int = 0, of_keys: bool = False) -> Tensor:
    """(B, L, *sizes), or of keys (B, Lk, *sizes)."""
    batch, *lengths, _ = SHAPES[shape]
    return torch.randn(batch, lengths[of_keys], *sizes, generator=torch.Generator().manual_seed(seed))


def draw_index(shape: str) -> list[Tensor]:
    return [draw(shape, 3, 12), draw(shape, 12, seed=1, of_keys=True), draw(shape, 3, seed=2)]


def draw_tokens(shape: str, n_heads: int, n_kv: int) -> list[Tensor]:
    return [draw(shape, n, 20, seed=10 * i + n, of_keys=i > 0) for i, n in enumerate((n_heads, n_kv, n_kv))]


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them in a short row."""
    monkeypatch.setattr(triton_scores, "TILE_Q", 16)
    monkeypatch.setattr(triton_scores, "TILE_K", 16)
    monkeypatch.setattr(triton_scores, "COLUMNS", 32)
    monkeypatch.setattr(triton_scores, "SPAN", 16)
    monkeypatch.setattr(triton_select, "PROGRAMS", 3)
    monkeypatch.setattr(triton_kl_dense, "BLOCK", 16)


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many chunks":
        for module in (triton_select, triton_kl_dense):
            monkeypatch.setattr(module, "CHUNK_NUMBERS", 19 * 2 * 43)


@pytest.fixture(params=["whole", "thinned out"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one chunk; or of many, longer than what is searched at once, so that fewer than top_k groups of keys make a
    bound, or more keys than can be searched reach it."""
    if request.param == "thinned out":
        monkeypatch.setattr(triton_select, "CHUNK_NUMBERS", 19 * 2 * 43)
        monkeypatch.setattr(triton_select, "SEARCHED", 8)


@shapes
@pytest.mark.parametrize("options", SELECTIONS, ids=str)
def test_selections_are_the_reference_s(shape: str, options: dict, rows: None) -> None:
    """Random scores: no two are equal but those of 0."""
    index = draw_index(shape)
    got, want = (
        dsa_select(*index, **options, cu_seqlens=bounds_of(shape), backend=backend) for backend in ("fla", "reference")
    )
    assert torch.equal(got, want)


@shapes
@pytest.mark.parametrize("options", SELECTIONS, ids=str)
def test_of_equal_scores_the_earlier_key_wins(shape: str, options: dict, rows: None) -> None:
    """Small whole numbers: products are exact, most scores are tied, many at 0 and at -0."""
    index = [
        draw(shape, *sizes, seed=3, of_keys=sizes == (3,)).round().clamp(-1, 1).half() for sizes in ((2, 3), (3,), (2,))
    ]
    got = dsa_select(*index, **options, cu_seqlens=bounds_of(shape), backend="fla")
    scores = dsa_truth.scores(*(x.double() for x in index))
    want = dsa_truth.chosen(scores, dsa_truth.seen_rows(*SHAPES[shape]), **options)
    assert torch.equal(dsa_truth.as_mask(got, SHAPES[shape][2]), want)
    assert torch.equal(got, dsa_select(*index, **options, cu_seqlens=bounds_of(shape), backend="reference"))


@pytest.fixture(params=["atomics", "deterministic"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inverse, "PAIRS", 300)
    torch.use_deterministic_algorithms(request.param == "deterministic")
    yield
    torch.use_deterministic_algorithms(False)


@shapes
@pytest.mark.parametrize(("n_heads", "n_kv"), [pytest.param(4, 1, marks=pytest.mark.wide), (6, 2)])
def test_attention_and_its_gradients_are_the_reference_s(shape: str, n_heads: int, n_kv: int, order: None) -> None:
    indices = dsa_select(*draw_index(shape), top_k=40, cu_seqlens=bounds_of(shape), backend="reference")
    inputs = [x.requires_grad_() for x in draw_tokens(shape, n_heads, n_kv)]
    got = dsa_attention(*inputs, indices, backend="fla")
    want = dsa_attention(*(x.double() for x in inputs), indices, backend="reference")
    torch.testing.assert_close(got, want, check_dtype=False, atol=1e-5, rtol=1e-5)
    weights = draw(shape, n_heads, 20, seed=9)
    gradients = [torch.autograd.grad(o[0], inputs, weights.to(o[0].dtype)) for o in (got, want)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@shapes
@pytest.mark.parametrize("is_dense", [False, True], ids=["selected", "dense"])
def test_the_kl_and_its_gradients_are_the_reference_s(shape: str, is_dense: bool, order: None, chunks: None) -> None:
    index, tokens = [x.requires_grad_() for x in draw_index(shape)], draw_tokens(shape, 6, 2)
    indices = dsa_select(*index, top_k=40, cu_seqlens=bounds_of(shape), backend="reference")
    _, lse = dsa_attention(*tokens, indices, backend="reference")
    options = {} if is_dense else {"indices": indices, "lse": lse}
    options["cu_seqlens"] = bounds_of(shape)
    results = []
    for backend, dtype in (("fla", torch.float32), ("reference", torch.float64)):
        kl = dsa_indexer_kl(*(x.to(dtype) for x in [*index, *tokens[:2]]), **options, backend=backend)
        results.append((kl, *torch.autograd.grad(2 * kl, index)))
    torch.testing.assert_close(*results, check_dtype=False, atol=2e-5, rtol=1e-4)


def test_a_fixed_order_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the queries are cut into chunks."""
    indices = torch.arange(8).expand(1, 43, 8).minimum(torch.arange(43)[:, None])
    indices = torch.where(torch.arange(8) <= torch.arange(43)[:, None], indices, -1).int()
    inputs = [draw("dense rows", n, 20, seed=n)[:1].requires_grad_() for n in (4, 1, 1)]
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for pairs in (1 << 20, 100):
            monkeypatch.setattr(inverse, "PAIRS", pairs)
            o, _ = dsa_attention(*inputs, indices, backend="fla")
            results.append(torch.autograd.grad(o.sum(), inputs))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*results)
    pairs = list(inverse.inverse_chunks(indices, 43))
    assert len(pairs) > 1 and sum(int(bounds[-1]) for _, bounds, _ in pairs) == (indices >= 0).sum()


def test_opcheck() -> None:
    bounds = torch.tensor([0, 7, 8, 13], dtype=torch.int32)
    index = [draw("documents", *sizes)[:, :13].clone().requires_grad_() for sizes in ((3, 12), (12,), (3,))]
    tokens = [draw("documents", n, 20)[:, :13].clone().requires_grad_() for n in (4, 2, 2)]
    indices = select(*index, bounds, 9, True, 1, "fla")
    _, lse = attend(*tokens, indices, 0.5, "fla")
    torch.library.opcheck(select, (*index, bounds, 9, True, 1, "fla"))
    torch.library.opcheck(attend, (*tokens, indices, 0.5, "fla"))
    fixed = [x.detach() for x in tokens[:2]]
    torch.library.opcheck(indexer_kl, (*index, *fixed, indices, lse.detach(), None, 0.5, "fla"))
    torch.library.opcheck(indexer_kl, (*index, *fixed, None, None, bounds, 0.5, "fla"))
