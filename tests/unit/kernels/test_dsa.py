"""DSA's reference operators against dense masks and autograd in fp64, fla's naive functions, and opcheck."""

from __future__ import annotations

import dsa_truth
import pytest
import torch
from torch import Tensor

from lt2titan.kernels.dsa import dsa_attention, dsa_indexer_kl, dsa_select, kl_reference, reference
from lt2titan.kernels.dsa.operators import attend, indexer_kl, select

DOCUMENTS = (7, 1, 20, 2, 10)
# Rows, queries and keys of each, and documents over the keys of all rows.
SHAPES = {
    "dense rows": (2, 23, 23, ()),
    "documents": (1, sum(DOCUMENTS), sum(DOCUMENTS), DOCUMENTS),
    "one token": (1, 1, 1, ()),
    "later queries": (2, 9, 23, ()),
    "later queries of documents": (3, 8, 24, (20, 4, 2, 20, 2, 24)),  # begun earlier, ended earlier, and here
}
shapes = pytest.mark.parametrize("shape", SHAPES)
SELECTIONS = [
    {"top_k": 4},
    {"top_k": 1},
    {"top_k": 5, "forced_first": True, "forced_local": 2},
    {"top_k": 64},
]


def draw(shape: str, seed: int = 0, n_kv: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """Inputs of the indexer and of attention, in fp64, and boundaries."""
    batch, n_queries, n_keys, documents = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(batch, *sizes, generator=generator, dtype=torch.float64)

    index = {"index_q": normal(n_queries, 3, 8), "index_k": normal(n_keys, 8), "w": normal(n_queries, 3)}
    tokens = {"q": normal(n_queries, 4, 6), "k": normal(n_keys, n_kv, 6), "v": normal(n_keys, n_kv, 6)}
    bounds = torch.tensor([0, *documents, 0, 0]).cumsum(0).int() if documents else None
    return index, tokens, bounds


@pytest.fixture(params=[1 << 24, 1 << 7], ids=["one block", "many blocks"], autouse=True)
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "NUMBERS", request.param)


@shapes
@pytest.mark.parametrize("options", SELECTIONS, ids=str)
def test_the_greatest_visible_scores_are_chosen(shape: str, options: dict) -> None:
    index, _, bounds = draw(shape)
    indices = dsa_select(**index, **options, cu_seqlens=bounds, backend="reference")
    want = dsa_truth.chosen(dsa_truth.scores(**index), dsa_truth.seen_rows(*SHAPES[shape]), **options)
    assert torch.equal(dsa_truth.as_mask(indices, SHAPES[shape][2]), want)
    n_chosen = want.sum(-1)
    assert torch.equal((indices >= 0).sum(-1), n_chosen)  # none named twice
    for row, n in zip(indices.flatten(0, 1), n_chosen.flatten(), strict=True):
        assert row[:n].tolist() == sorted(row[:n].tolist()) and (row[n:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", SELECTIONS, ids=str)
def test_of_equal_scores_the_earlier_key_wins(options: dict, dtype: torch.dtype) -> None:
    """Small whole numbers: products are exact in every dtype, most scores are tied, many at 0 and at -0."""
    generator = torch.Generator().manual_seed(1)
    index = {
        name: torch.randint(-1, 2, shape, generator=generator).to(dtype)
        for name, shape in {"index_q": (2, 30, 2, 3), "index_k": (2, 30, 3), "w": (2, 30, 2)}.items()
    }
    indices = dsa_select(**index, **options, backend="reference")
    scores = dsa_truth.scores(**{name: x.double() for name, x in index.items()})
    assert (scores == 0).float().mean() > 0.3
    want = dsa_truth.chosen(scores, dsa_truth.seen_mask(30), **options)
    assert torch.equal(dsa_truth.as_mask(indices), want)


@shapes
@pytest.mark.parametrize("n_kv", [1, 2, 4])
def test_attention_is_a_softmax_over_the_chosen_keys(shape: str, n_kv: int) -> None:
    index, tokens, bounds = draw(shape, n_kv=n_kv)
    indices = dsa_select(**index, top_k=4, cu_seqlens=bounds, backend="reference")
    inputs = [x.requires_grad_() for x in tokens.values()]
    o, _ = dsa_attention(*inputs, indices, backend="reference")
    want, _ = dsa_truth.attention(*inputs, dsa_truth.as_mask(indices, SHAPES[shape][2]))
    torch.testing.assert_close(o, want, atol=1e-12, rtol=1e-10)
    weights = torch.randn(o.shape, dtype=o.dtype)
    gradients = [torch.autograd.grad(y, inputs, weights) for y in (o, want)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-9)


@shapes
def test_as_many_slots_as_tokens_are_dense_attention(shape: str) -> None:
    index, tokens, bounds = draw(shape)
    n_keys = SHAPES[shape][2]
    indices = dsa_select(**index, top_k=n_keys, cu_seqlens=bounds, backend="reference")
    seen = dsa_truth.seen_rows(*SHAPES[shape])
    assert torch.equal(dsa_truth.as_mask(indices, n_keys), seen)
    o, lse = dsa_attention(**tokens, indices=indices, backend="reference")
    torch.testing.assert_close(o, dsa_truth.attention(**tokens, mask=seen)[0], atol=1e-12, rtol=1e-10)
    both = [
        dsa_indexer_kl(**index, q=tokens["q"], k=tokens["k"], cu_seqlens=bounds, backend="reference", **selected)
        for selected in ({"indices": indices, "lse": lse}, {})
    ]
    torch.testing.assert_close(*both, atol=1e-12, rtol=1e-10)


@shapes
@pytest.mark.parametrize("is_dense", [False, True], ids=["selected", "dense"])
def test_the_kl_and_its_gradients_are_those_of_autograd(shape: str, is_dense: bool) -> None:
    index, tokens, bounds = draw(shape)
    inputs = {name: x.requires_grad_() for name, x in index.items()}
    q, k = tokens["q"].requires_grad_(), tokens["k"].requires_grad_()
    indices = dsa_select(**index, top_k=4, cu_seqlens=bounds, backend="reference")
    _, lse = dsa_attention(**tokens, indices=indices, backend="reference")
    options = {"cu_seqlens": bounds} if is_dense else {"indices": indices, "lse": lse}
    got = dsa_indexer_kl(**inputs, q=q, k=k, backend="reference", **options)
    mask = dsa_truth.seen_rows(*SHAPES[shape]) if is_dense else dsa_truth.as_mask(indices, SHAPES[shape][2])
    _, p = dsa_truth.attention(**tokens, mask=mask)
    want = dsa_truth.kl(dsa_truth.scores(**inputs), p, mask)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    gradients = [torch.autograd.grad(3 * kl, list(inputs.values()), retain_graph=True) for kl in (got, want)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-9)
    assert torch.autograd.grad(got, [q, k], allow_unused=True) == (None, None)


def test_a_document_ends_with_its_row() -> None:
    """Boundaries that say otherwise make no query look for keys in front of its row."""
    index, tokens, _ = draw("later queries")
    one = torch.tensor([0, 2 * 23], dtype=torch.int32)
    chosen = [dsa_select(**index, top_k=4, cu_seqlens=bounds, backend="reference") for bounds in (one, None)]
    assert torch.equal(*chosen)
    kl = [dsa_indexer_kl(**index, q=tokens["q"], k=tokens["k"], cu_seqlens=b, backend="reference") for b in (one, None)]
    assert torch.equal(*kl)


def test_equals_fla_naive_dsa() -> None:
    """Which of equal scores wins is left open there, so selections are compared by their scores, and attention over
    fla's selection."""
    naive = pytest.importorskip("fla.ops.dsa.naive")
    for shape in ("dense rows", "documents"):
        index, tokens, bounds = draw(shape)
        index, tokens = ({name: x.float() for name, x in inputs.items()} for inputs in (index, tokens))
        indices = dsa_select(**index, top_k=4, cu_seqlens=bounds, backend="reference")
        if bounds is not None:
            bounds = bounds[:-2]  # the padding
        want, theirs = naive.naive_dsa(
            *tokens.values(), *index.values(), topk=4, cu_seqlens=bounds, return_indices=True
        )
        start = reference.document_starts(*want.shape[:2], want.shape[1], bounds, want.device)[..., None]
        theirs = torch.where(theirs < 0, -1, theirs + start).int()  # theirs count from the document's start
        scores = dsa_truth.scores(**index)
        selected = [
            scores.masked_fill(~dsa_truth.as_mask(slots), -torch.inf).sort(-1).values for slots in (indices, theirs)
        ]
        torch.testing.assert_close(*selected)
        assert (dsa_truth.as_mask(indices) == dsa_truth.as_mask(theirs)).float().mean() > 0.9
        o, _ = dsa_attention(**tokens, indices=theirs, backend="reference")
        torch.testing.assert_close(o, want, atol=1e-5, rtol=1e-4)


def test_opcheck() -> None:
    index, tokens, bounds = draw("documents")
    inputs = [x.requires_grad_() for x in index.values()]
    q, k, v = (x.requires_grad_() for x in tokens.values())
    indices = select(*index.values(), bounds, 4, True, 1, "reference")
    _, lse = attend(q, k, v, indices, 0.5, "reference")
    torch.library.opcheck(select, (*index.values(), bounds, 4, True, 1, "reference"))
    torch.library.opcheck(attend, (q, k, v, indices, 0.5, "reference"))
    fixed = q.detach(), k.detach()
    torch.library.opcheck(indexer_kl, (*inputs, *fixed, indices, lse.detach(), None, 0.5, "reference"))
    torch.library.opcheck(indexer_kl, (*inputs, *fixed, None, None, bounds, 0.5, "reference"))


def test_what_does_not_fit_is_refused() -> None:
    index, tokens, _ = draw("dense rows")
    with pytest.raises(ValueError, match="top_k = 3 must be positive and hold what is forced"):
        dsa_select(**index, top_k=3, forced_first=True, forced_local=3, backend="reference")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        dsa_select(**index, top_k=3, backend="cuda")
    with pytest.raises(ValueError, match="take bf16, fp16 or fp32"):
        dsa_select(**index, top_k=3, backend="fla")
    with pytest.raises(ValueError, match=r"index_k \(B, Lk, E\) with Lk at least L"):
        dsa_select(index["index_q"], index["index_k"][:, 1:], index["w"], top_k=3, backend="reference")
    with pytest.raises(ValueError, match="Lk at least L"):
        dsa_attention(tokens["q"], tokens["k"][:, 1:], tokens["v"][:, 1:], torch.zeros(2, 23, 1).int(), backend="fla")
    with pytest.raises(ValueError, match="k as many as index_k"):
        dsa_indexer_kl(**index, q=tokens["q"][:, 1:], k=tokens["k"][:, 1:], backend="reference")
    with pytest.raises(ValueError, match="cu_seqlens is a 1-D int32 tensor"):
        dsa_select(**index, top_k=3, cu_seqlens=torch.tensor([0.0, 23.0]), backend="reference")
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        dsa_attention(tokens["q"][:, :, :3], *list(tokens.values())[1:], torch.zeros(2, 23, 1).int(), backend="fla")
    with pytest.raises(ValueError, match="indices come with lse"):
        indices = dsa_select(**index, top_k=3, backend="reference")
        dsa_indexer_kl(**index, q=tokens["q"], k=tokens["k"], indices=indices, backend="reference")


def test_blocks_are_as_many_as_the_fixture_asks_for() -> None:
    assert len(list(reference.query_blocks(23, 16))) in (1, 3)
    assert kl_reference.query_blocks is reference.query_blocks
