"""What is particular to linear attention with a scalar decay; test_recurrences.py has the rest."""

from __future__ import annotations

import pytest
import torch

from lt2titan.kernels.check.recurrences import RECURRENCES, Draw, Sizes
from lt2titan.kernels.simple_gla import simple_gla
from lt2titan.kernels.simple_gla.reference import recurrent_simple_gla
from lt2titan.model.mixers.retnet import log_decays

INPUTS = RECURRENCES["simple_gla"].inputs


def test_the_definition_is_the_equation() -> None:
    """Per sequence and head, with the products written out; value heads 2i and 2i + 1 read key head i."""
    q, k, v, g = INPUTS(Draw(2, 5, Sizes(2, 4, 6, 10)))
    state = torch.randn(2, 4, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    o, final = recurrent_simple_gla(q, k, v, g, state, 0.3)
    for b in range(2):
        for h in range(4):
            S = state[b, h]
            for t in range(5):
                S = g[b, t, h].exp() * S + torch.outer(k[b, t, h // 2], v[b, t, h])
                torch.testing.assert_close(o[b, t, h], 0.3 * S.T @ q[b, t, h // 2])
            torch.testing.assert_close(final[b, h], S)


def test_it_is_attention_through_a_1_semiseparable_mask() -> None:
    """Mamba-2's duality (arXiv 2405.21060, equation 16): (L * C B^T) X with L_ti = a_t ... a_{i+1}, as one matrix."""
    q, k, v, g = INPUTS(Draw(1, 70, Sizes(1, 2, 6, 10)))
    o, _ = simple_gla(q, k, v, g, scale=1.0, backend="reference")
    for h in range(2):
        a = g[0, :, h].exp()
        mask = torch.stack([torch.stack([a[i + 1 : t + 1].prod() * (i <= t) for i in range(70)]) for t in range(70)])
        torch.testing.assert_close(o[0, :, h], (mask * (q[0, :, 0] @ k[0, :, 0].T)) @ v[0, :, h])


def test_fla_defines_the_same_function() -> None:
    naive = pytest.importorskip("fla.ops.simple_gla.naive", exc_type=ImportError)
    inputs = [x.float().requires_grad_() for x in INPUTS(Draw(2, 70, Sizes(2, 2, 6, 10)))]
    state = torch.randn(2, 2, 6, 10, generator=torch.Generator().manual_seed(1))
    expected = naive.naive_recurrent_simple_gla(*inputs, initial_state=state)
    actual = simple_gla(*inputs, initial_state=state, return_final_state=True, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    grads, expected_grads = (
        torch.autograd.grad(o.square().sum() + final.square().sum(), inputs) for o, final in (actual, expected)
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


def test_with_the_decays_of_retnet_it_is_flas_retention() -> None:
    naive = pytest.importorskip("fla.ops.retention.naive", exc_type=ImportError)
    q, k, v, _ = (x.float() for x in INPUTS(Draw(2, 70, Sizes(4, 4, 6, 10))))
    g = log_decays(4, torch.device("cpu")).float().expand(v.shape[:3])
    o, _ = simple_gla(q, k, v, g, backend="reference")
    expected = naive.naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": torch.zeros(1, 8, 3, 10)}, "3 value heads are not a multiple of 2 key heads"),
        ({"g": torch.zeros(1, 8, 2)}, r"g is \(B, L, HV\) = \(1, 8, 4\), got \(1, 8, 2\)"),
    ],
)
def test_errors_say_what_is_wrong(change: dict, message: str) -> None:
    inputs = dict(zip(("q", "k", "v", "g"), INPUTS(Draw(1, 8, Sizes(2, 4, 6, 10))), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        simple_gla(**inputs, backend="reference")
