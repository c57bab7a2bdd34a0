"""What is particular to Kimi delta attention; test_recurrences.py has the rest."""

from __future__ import annotations

import pytest
import torch

from lt2titan.kernels.check.recurrences import RECURRENCES, Draw, Sizes
from lt2titan.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule
from lt2titan.kernels.kda import kda
from lt2titan.kernels.kda.reference import recurrent_kda

INPUTS = RECURRENCES["kda"].inputs


def test_the_definition_is_the_equation() -> None:
    """Per sequence and head, with the matrix products of the paper's equation 1 written out."""
    q, k, v, g, beta = INPUTS(Draw(2, 5, Sizes(2, 4, 6, 10)))
    state = torch.randn(2, 4, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    o, final = recurrent_kda(q, k, v, g, beta, state, 0.3)
    for b in range(2):
        for h in range(4):
            S = state[b, h]
            for t in range(5):
                k_t = k[b, t, h // 2]
                erase = torch.eye(6, dtype=torch.float64) - beta[b, t, h] * torch.outer(k_t, k_t)
                S = erase @ g[b, t, h].exp().diag() @ S + beta[b, t, h] * torch.outer(k_t, v[b, t, h])
                torch.testing.assert_close(o[b, t, h], 0.3 * S.T @ q[b, t, h // 2])
            torch.testing.assert_close(final[b, h], S)


def test_one_decay_for_all_channels_is_the_gated_delta_rule() -> None:
    q, k, v, g, beta = INPUTS(Draw(2, 40, Sizes(2, 4, 6, 10)))
    expected = recurrent_gated_delta_rule(q, k, v, g[..., 0], beta, None, 0.3)
    same = g[..., :1].expand_as(g)
    actual = kda(q, k, v, same, beta, scale=0.3, return_final_state=True, backend="reference")
    torch.testing.assert_close(actual, expected)


def test_fla_defines_the_same_function() -> None:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed", exc_type=ImportError)
    naive = pytest.importorskip("fla.ops.kda.naive", exc_type=ImportError)
    q, k, v, g, beta = (x.float() for x in INPUTS(Draw(2, 50, Sizes(2, 4, 6, 10))))
    state = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(1))
    expected = naive.naive_recurrent_kda(q, k, v, g, beta, None, state, True)
    actual = kda(q, k, v, g, beta, initial_state=state, return_final_state=True, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": torch.zeros(1, 8, 3, 10)}, "3 value heads are not a multiple of 2 key heads"),
        ({"g": torch.zeros(1, 8, 4)}, r"g is \(B, L, HV, K\) = \(1, 8, 4, 6\), got \(1, 8, 4\)"),
        ({"beta": torch.zeros(1, 7, 4)}, r"beta is \(B, L, HV\) = \(1, 8, 4\)"),
    ],
)
def test_errors_say_what_is_wrong(change: dict, message: str) -> None:
    names = ("q", "k", "v", "g", "beta")
    inputs = dict(zip(names, INPUTS(Draw(1, 8, Sizes(2, 4, 6, 10))), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        kda(**inputs, backend="reference")
