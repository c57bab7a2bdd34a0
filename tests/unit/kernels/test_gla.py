"""What is particular to gated linear attention; test_recurrences.py has the rest."""

from __future__ import annotations

import pytest
import torch

from lt2titan.kernels.check.recurrences import RECURRENCES, Draw, Sizes
from lt2titan.kernels.gla import gla
from lt2titan.kernels.gla.reference import recurrent_gla

INPUTS = RECURRENCES["gla"].inputs


def test_the_definition_is_the_equation() -> None:
    """Per sequence and head, with the matrix products of the paper's equation 3 written out."""
    q, k, v, g = INPUTS(Draw(2, 5, Sizes(2, 2, 6, 10)))
    state = torch.randn(2, 2, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    o, final = recurrent_gla(q, k, v, g, state, 0.3)
    for b in range(2):
        for h in range(2):
            S = state[b, h]
            for t in range(5):
                S = g[b, t, h].exp().diag() @ S + torch.outer(k[b, t, h], v[b, t, h])
                torch.testing.assert_close(o[b, t, h], 0.3 * S.T @ q[b, t, h])
            torch.testing.assert_close(final[b, h], S)


def test_without_decay_it_is_causal_linear_attention() -> None:
    q, k, v, g = INPUTS(Draw(2, 40, Sizes(2, 2, 6, 10)))
    o, _ = gla(q, k, v, torch.zeros_like(g), scale=1.0, backend="reference")
    scores = torch.einsum("bthk,bihk->bhti", q, k).tril()
    torch.testing.assert_close(o, torch.einsum("bhti,bihv->bthv", scores, v))


def test_fla_defines_the_same_function() -> None:
    naive = pytest.importorskip("fla.ops.gla.naive", exc_type=ImportError)
    inputs = [x.float().requires_grad_() for x in INPUTS(Draw(2, 50, Sizes(2, 2, 6, 10)))]
    state = torch.randn(2, 2, 6, 10, generator=torch.Generator().manual_seed(1))
    expected = naive.naive_recurrent_gla(*inputs, state, True)
    actual = gla(*inputs, initial_state=state, return_final_state=True, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    grads, expected_grads = (
        torch.autograd.grad(o.square().sum() + final.square().sum(), inputs) for o, final in (actual, expected)
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": torch.zeros(1, 8, 4, 10)}, "v has 4 heads, q and k have 2"),
        ({"g": torch.zeros(1, 8, 2)}, r"g is \(B, L, H, K\) = \(1, 8, 2, 6\), got \(1, 8, 2\)"),
    ],
)
def test_errors_say_what_is_wrong(change: dict, message: str) -> None:
    inputs = dict(zip(("q", "k", "v", "g"), INPUTS(Draw(1, 8, Sizes(2, 2, 6, 10))), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        gla(**inputs, backend="reference")
