"""What is particular to the DPLR delta rule; test_recurrences.py has the rest."""

from __future__ import annotations

import pytest
import torch

from lt2titan.kernels.check.recurrences import RECURRENCES, Draw, Sizes
from lt2titan.kernels.dplr_delta_rule import LOWEST_LOG_DECAY, dplr_delta_rule
from lt2titan.kernels.dplr_delta_rule.reference import recurrent_dplr_delta_rule
from lt2titan.kernels.kda.reference import recurrent_kda

INPUTS = RECURRENCES["dplr_delta_rule"].inputs
SIZES = Sizes(2, 2, 6, 10)


def test_the_definition_is_the_equation() -> None:
    """Per sequence and head, with the matrix products of RWKV-7's equation 17 written out."""
    q, k, v, a, b, g = INPUTS(Draw(2, 5, SIZES))
    state = torch.randn(2, 2, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    o, final = recurrent_dplr_delta_rule(q, k, v, a, b, g, state, 0.3)
    for row in range(2):
        for h in range(2):
            S = state[row, h]
            for t in range(5):
                transition = g[row, t, h].exp().diag() + torch.outer(b[row, t, h], a[row, t, h])
                S = transition @ S + torch.outer(k[row, t, h], v[row, t, h])
                torch.testing.assert_close(o[row, t, h], 0.3 * S.T @ q[row, t, h])
            torch.testing.assert_close(final[row, h], S)


def test_kimi_delta_attention_is_a_case() -> None:
    """(I - beta k k^T) Diag(exp(g)) is diagonal plus low rank, at decays far below RWKV-7's too."""
    q, k, v, g, beta = RECURRENCES["kda"].inputs(Draw(2, 40, SIZES))
    assert g.min() < 10 * LOWEST_LOG_DECAY
    expected = recurrent_kda(q, k, v, g, beta, None, 0.3)
    beta = beta.unsqueeze(-1)
    actual = dplr_delta_rule(
        q, beta * k, v, g.exp() * k, -beta * k, g, scale=0.3, return_final_state=True, backend="reference"
    )
    torch.testing.assert_close(actual, expected)


def test_fla_defines_the_same_function() -> None:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed", exc_type=ImportError)
    naive = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive", exc_type=ImportError)
    inputs = [x.float() for x in INPUTS(Draw(2, 50, SIZES))]
    state = torch.randn(2, 2, 6, 10, generator=torch.Generator().manual_seed(1))
    o, final = naive.dplr_recurrence(*(x.transpose(1, 2) for x in inputs), initial_state=state)
    actual = dplr_delta_rule(*inputs, initial_state=state, return_final_state=True, backend="reference")
    torch.testing.assert_close(actual, (o.transpose(1, 2), final), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": torch.zeros(1, 8, 4, 10)}, "4 value heads for 2 query heads"),
        ({"g": torch.zeros(1, 8, 2)}, r"g is \(B, L, H, K\) = \(1, 8, 2, 6\), got \(1, 8, 2\)"),
        ({"b": torch.zeros(1, 7, 2, 6)}, r"b is \(B, L, H, K\) = \(1, 8, 2, 6\)"),
        ({"a": torch.zeros(1, 8, 2, 6)}, "a and b must have q's dtype torch.float64, got torch.float32"),
    ],
)
def test_errors_say_what_is_wrong(change: dict, message: str) -> None:
    inputs = dict(zip(("q", "k", "v", "a", "b", "g"), INPUTS(Draw(1, 8, SIZES)), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        dplr_delta_rule(**inputs, backend="reference")
