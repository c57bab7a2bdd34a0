"""What is particular to the gated delta rule; test_recurrences.py has the rest."""

from __future__ import annotations

import pytest
import torch

from lt2titan.kernels.check.recurrences import RECURRENCES, Draw, Sizes
from lt2titan.kernels.gated_delta_rule import gated_delta_rule
from lt2titan.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule

INPUTS = RECURRENCES["gated_delta_rule"].inputs


def test_the_definition_is_the_equation() -> None:
    """Per sequence and head, with the matrix products of the paper's equation 10 written out."""
    q, k, v, g, beta = INPUTS(Draw(2, 5, Sizes(2, 4, 6, 10)))
    state = torch.randn(2, 4, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    o, final = recurrent_gated_delta_rule(q, k, v, g, beta, state, 0.3)
    for b in range(2):
        for h in range(4):
            S = state[b, h]
            for t in range(5):
                k_t = k[b, t, h // 2]
                erase = torch.eye(6, dtype=torch.float64) - beta[b, t, h] * torch.outer(k_t, k_t)
                S = g[b, t, h].exp() * erase @ S + beta[b, t, h] * torch.outer(k_t, v[b, t, h])
                torch.testing.assert_close(o[b, t, h], 0.3 * S.T @ q[b, t, h // 2])
            torch.testing.assert_close(final[b, h], S)


def test_without_decay_it_is_the_delta_rule_of_fla() -> None:
    naive = pytest.importorskip("fla.ops.delta_rule.naive", exc_type=ImportError)
    q, k, v, g, beta = (x.float() for x in INPUTS(Draw(2, 50, Sizes(2, 2, 6, 10))))
    state = torch.randn(2, 2, 6, 10, generator=torch.Generator().manual_seed(1))
    o, final = naive.delta_rule_recurrence(*(x.transpose(1, 2) for x in (q, k, v, beta)), initial_state=state)
    actual = gated_delta_rule(
        q, k, v, torch.zeros_like(g), beta, initial_state=state, return_final_state=True, backend="reference"
    )
    torch.testing.assert_close(actual, (o.transpose(1, 2), final), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": torch.zeros(1, 8, 3, 10)}, "3 value heads are not a multiple of 2 key heads"),
        ({"g": torch.zeros(1, 8, 2)}, r"g is \(B, L, HV\) = \(1, 8, 4\), got \(1, 8, 2\)"),
        ({"beta": torch.zeros(1, 7, 4)}, r"beta is \(B, L, HV\) = \(1, 8, 4\)"),
    ],
)
def test_errors_say_what_is_wrong(change: dict, message: str) -> None:
    names = ("q", "k", "v", "g", "beta")
    inputs = dict(zip(names, INPUTS(Draw(1, 8, Sizes(2, 4, 6, 10))), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**inputs, backend="reference")
