from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.gated_delta_rule import _gated_delta_rule, gated_delta_rule
from lt2titan.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule

DOCUMENTS = [0, 1, 70, 71, 71, 140, 147, 147]  # lengths 1, 69, 1, 0, 69, 7, 0


def make_inputs(
    B: int,
    L: int,
    H: int = 2,
    HV: int = 4,
    K: int = 6,
    V: int = 10,
    *,
    N: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q, k, v, g, beta and, for N > 0, an initial state of N sequences."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(B, L, H, K, dtype=torch.float64), dim=-1) for _ in range(2))
    v = torch.randn(B, L, HV, V, dtype=torch.float64)
    g = -torch.rand(B, L, HV, dtype=torch.float64)
    beta = 2 * torch.rand(B, L, HV, dtype=torch.float64)  # up to 2: negative eigenvalues
    inputs = [x.to(dtype) for x in (q, k, v, g, beta)]
    if N:
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        inputs.append(torch.randn(N, HV, K, V, dtype=state_dtype))
    return inputs


def run(inputs: list[Tensor], **kwargs) -> tuple[Tensor, Tensor | None]:
    state = inputs[5] if len(inputs) > 5 else None
    return gated_delta_rule(*inputs[:5], initial_state=state, backend="reference", **kwargs)


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a fixed random projection of all outputs."""
    torch.manual_seed(1)
    loss = sum((o * torch.randn(o.shape, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(loss, inputs)


def assert_close(actual, expected, tolerance: float = 1e-11) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_the_recurrent_reference_is_the_equation() -> None:
    """Per sequence and head, with the matrix products of the paper's equation 10 written out."""
    q, k, v, g, beta, state = make_inputs(2, 5, N=2)
    o, final = recurrent_gated_delta_rule(q, k, v, g, beta, state, None, 0.3)
    for b in range(2):
        for h in range(4):
            S = state[b, h]
            for t in range(5):
                k_t = k[b, t, h // 2]
                erase = torch.eye(6, dtype=torch.float64) - beta[b, t, h] * torch.outer(k_t, k_t)
                S = g[b, t, h].exp() * erase @ S + beta[b, t, h] * torch.outer(k_t, v[b, t, h])
                torch.testing.assert_close(o[b, t, h], 0.3 * S.T @ q[b, t, h // 2])
            torch.testing.assert_close(final[b, h], S)


@pytest.mark.parametrize("L", [1, 3, 31, 32, 33, 65, 100])
@pytest.mark.parametrize("with_state", [False, True])
def test_values_and_gradients_match_the_recurrence(L: int, with_state: bool) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(2, L, N=2 * with_state)]
    state = inputs[5] if with_state else None
    expected = recurrent_gated_delta_rule(*inputs[:5], state, None, 6**-0.5)
    actual = run(inputs, return_final_state=True)
    assert_close(actual, expected)
    assert_close(gradients(actual, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_documents_match_each_document_alone(with_state: bool) -> None:
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)
    N = len(DOCUMENTS) - 1
    inputs = [x.requires_grad_() for x in make_inputs(1, DOCUMENTS[-1], N=N * with_state)]
    packed = run(inputs, cu_seqlens=cu_seqlens, return_final_state=True)
    outputs, finals = [], []
    for n, (start, end) in enumerate(pairwise(DOCUMENTS)):
        zeros = torch.zeros(1, 4, 6, 10, dtype=torch.float64)
        state = inputs[5][n : n + 1] if with_state else zeros
        if start < end:
            o, state = run([*(x[:, start:end] for x in inputs[:5]), state], return_final_state=True)
            outputs.append(o)
        finals.append(state)
    alone = torch.cat(outputs, dim=1), torch.cat(finals)
    assert_close(packed, alone)
    assert_close(gradients(packed, inputs), gradients(alone, inputs))


def test_a_document_never_sees_another() -> None:
    cu_seqlens = torch.tensor([0, 40, 90])
    inputs = [x.requires_grad_() for x in make_inputs(1, 90)]
    o, _ = run(inputs, cu_seqlens=cu_seqlens)
    for grad in torch.autograd.grad(o[:, 40:].square().sum(), inputs):
        assert grad[:, :40].abs().max() == 0 and grad[:, 40:].abs().max() > 0


@pytest.mark.parametrize("cut", [1, 32, 50])
def test_split_with_carried_state_equals_the_whole(cut: int) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(2, 80, N=2)]
    whole = run(inputs, return_final_state=True)
    o1, state = run([*(x[:, :cut] for x in inputs[:5]), inputs[5]], return_final_state=True)
    o2, final = run([*(x[:, cut:] for x in inputs[:5]), state], return_final_state=True)
    parts = torch.cat([o1, o2], dim=1), final
    assert_close(parts, whole)
    assert_close(gradients(parts, inputs), gradients(whole, inputs))


def test_token_by_token_without_gradients_equals_the_whole() -> None:
    inputs = make_inputs(2, 40, N=2)
    whole, final = run(inputs, return_final_state=True)
    state, outputs = inputs[5], []
    for t in range(40):
        o, state = run([*(x[:, t : t + 1] for x in inputs[:5]), state], return_final_state=True)
        outputs.append(o)
    assert_close((torch.cat(outputs, dim=1), state), (whole, final))


def test_only_the_final_state_is_used() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(1, 40, N=1)]
    _, expected = recurrent_gated_delta_rule(*inputs, None, 6**-0.5)
    _, actual = run(inputs, return_final_state=True)
    assert_close(
        torch.autograd.grad(actual.square().sum(), inputs[1:]),
        torch.autograd.grad(expected.square().sum(), inputs[1:]),
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_inputs_are_computed_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(2, 70, N=2, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    o, final = run(inputs, return_final_state=True)
    assert o.dtype == dtype and final.dtype == torch.float32
    expected = recurrent_gated_delta_rule(*exact, None, 6**-0.5)
    grads, expected_grads = gradients((o, final), inputs), gradients(expected, exact)
    assert [x.dtype for x in grads] == [x.dtype for x in inputs]
    for a, e in zip((o, final, *grads), (*expected, *expected_grads), strict=True):
        assert (a.double() - e).norm() / e.norm() < tolerance
    assert (final.double() - expected[1]).norm() / expected[1].norm() < 1e-5  # the state never leaves fp32


def test_strong_decay_neither_overflows_nor_leaks() -> None:
    q, k, v, g, beta = make_inputs(1, 100, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v, g * 200, beta)]
    o, _ = run(inputs)
    expected, _ = recurrent_gated_delta_rule(*inputs, None, None, 6**-0.5)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), inputs))


@pytest.mark.parametrize("packed, with_state", [(False, False), (False, True), (True, True)])
def test_opcheck(packed: bool, with_state: bool) -> None:
    cu_seqlens = torch.tensor([0, 1, 40, 40], dtype=torch.int32) if packed else None
    inputs = [x.requires_grad_() for x in make_inputs(1, 40, N=(3 if packed else 1) * with_state, dtype=torch.float32)]
    state = inputs[5] if with_state else None
    for return_final_state in (False, True):
        args = (*inputs[:5], state, cu_seqlens, None, 0.4, return_final_state, False, "reference")
        torch.library.opcheck(_gated_delta_rule, args)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_into_one_graph(packed: bool) -> None:
    cu_seqlens = torch.tensor([0, 13, 40, 40], dtype=torch.int32) if packed else None

    def layer(q, k, v, g, beta, state):
        o, final = gated_delta_rule(
            q,
            k,
            v.tanh(),
            g,
            beta,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
            backend="reference",
        )
        return o * 2, final

    inputs = [x.requires_grad_() for x in make_inputs(1, 40, N=3 if packed else 1)]
    expected = layer(*inputs)
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)
    assert_close(actual, expected)
    assert_close(gradients(actual, inputs), gradients(expected, inputs))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "tritonn"}, "backend is 'tritonn'"),
        ({"v": torch.zeros(1, 8, 3, 10)}, "3 value heads are not a multiple of 2 key heads"),
        ({"g": torch.zeros(1, 8, 2)}, "g and beta are"),
        ({"q": torch.zeros(1, 7, 2, 6)}, r"q and k are \(B, L, H, K\)"),
        ({"k": torch.zeros(1, 8, 2, 6, dtype=torch.bfloat16)}, "share one dtype"),
        (
            {"initial_state": torch.zeros(1, 4, 6, 10, dtype=torch.bfloat16)},
            r"torch.float32, got .* torch.bfloat16",
        ),
        ({"initial_state": torch.zeros(2, 4, 6, 10)}, "2 rows for 1 sequences"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "number of tokens"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "int32"),
    ],
)
def test_errors_say_what_is_wrong(change: dict, message: str) -> None:
    q, k, v, g, beta = make_inputs(1, 8, dtype=torch.float32)
    kwargs = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "backend": "reference"} | change
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**kwargs)


def test_fla_limits_are_named() -> None:
    with pytest.raises(ValueError, match=r"up to 256 wide.*kernels.backend=reference"):
        q, k, v, g, beta = make_inputs(1, 8, dtype=torch.float64)
        gated_delta_rule(q, k, v, g, beta, backend="fla")
