"""Every recurrence's operator on the reference back end against its token-by-token definition, in fp64.

The definitions themselves are compared with the papers' equations and with other people's code in test_<operator>.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lt2titan.kernels.check.recurrences import RECURRENCES, Decay, Draw, Sizes

DOCUMENTS = [0, 1, 70, 71, 71, 140, 147, 147]  # lengths 1, 69, 1, 0, 69, 7, 0
SCALE = 0.4

each = pytest.mark.parametrize("name", RECURRENCES)


def sizes_of(name: str) -> Sizes:
    return Sizes(H=2, HV=4 if RECURRENCES[name].grouped_values else 2, K=6, V=10)


def make_inputs(
    name: str, B: int, L: int, N: int = 0, dtype: torch.dtype = torch.float64, decay: Decay = "mixed"
) -> list[Tensor]:
    """The operator's inputs, requiring gradients, and for N > 0 the initial state of N sequences last."""
    sizes = sizes_of(name)
    draw = Draw(B, L, sizes, decay)
    inputs = [x.to(dtype) for x in RECURRENCES[name].inputs(draw)]
    if N:
        state = torch.randn(N, sizes.HV, sizes.K, sizes.V, dtype=torch.float64, generator=draw.generator)
        inputs.append(state if dtype == torch.float64 else state.float())
    return [x.requires_grad_() for x in inputs]


def run(name: str, inputs: list[Tensor], cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and final state of the operator; ``inputs`` may end with an initial state."""
    operator = RECURRENCES[name].operator
    tokens, state = inputs[: operator.n_inputs], inputs[operator.n_inputs :]
    o, final = operator(
        *tokens,
        scale=SCALE,
        initial_state=state[0] if state else None,
        cu_seqlens=cu_seqlens,
        chunk_indices=None,
        return_final_state=True,
        backend="reference",
    )
    assert final is not None
    return o, final


def define(name: str, inputs: list[Tensor], cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check = RECURRENCES[name]
    tokens, state = inputs[: check.operator.n_inputs], inputs[check.operator.n_inputs :]
    return check.definition(*tokens, state[0] if state else None, SCALE, cu_seqlens)


def cut(name: str, inputs: list[Tensor], start: int, end: int) -> list[Tensor]:
    return [x[:, start:end] for x in inputs[: RECURRENCES[name].operator.n_inputs]]


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a fixed random projection of all outputs."""
    torch.manual_seed(1)
    loss = sum((o * torch.randn(o.shape, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(loss, inputs)


def assert_close(actual, expected, tolerance: float = 1e-10) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, check_dtype=False)


@each
@pytest.mark.parametrize("L", [1, 3, 15, 33, 100])
@pytest.mark.parametrize("with_state", [False, True])
def test_values_and_gradients_match_the_definition(name: str, L: int, with_state: bool) -> None:
    inputs = make_inputs(name, 2, L, N=2 * with_state)
    expected, actual = define(name, inputs), run(name, inputs)
    assert_close(actual, expected)
    assert_close(gradients(actual, inputs), gradients(expected, inputs))


@each
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_documents_match_each_document_alone(name: str, with_state: bool) -> None:
    N = len(DOCUMENTS) - 1
    inputs = make_inputs(name, 1, DOCUMENTS[-1], N=N * with_state)
    packed = run(name, inputs, torch.tensor(DOCUMENTS, dtype=torch.int32))
    sizes = sizes_of(name)
    outputs, finals = [], []
    for n, (start, end) in enumerate(pairwise(DOCUMENTS)):
        state = inputs[-1][n : n + 1] if with_state else torch.zeros(1, *sizes[1:], dtype=torch.float64)
        if start < end:
            o, state = define(name, [*cut(name, inputs, start, end), state])
            outputs.append(o)
        finals.append(state)
    alone = torch.cat(outputs, dim=1), torch.cat(finals)
    assert_close(packed, alone)
    assert_close(gradients(packed, inputs), gradients(alone, inputs))
    assert_close(define(name, inputs, torch.tensor(DOCUMENTS)), alone)


@each
def test_a_document_never_sees_another(name: str) -> None:
    inputs = make_inputs(name, 1, 90)
    o, _ = run(name, inputs, torch.tensor([0, 40, 90]))
    for grad in torch.autograd.grad(o[:, 40:].square().sum(), inputs):
        assert grad[:, :40].abs().max() == 0 and grad[:, 40:].abs().max() > 0


@each
@pytest.mark.parametrize("length", [1, 32, 50])
def test_split_with_carried_state_equals_the_whole(name: str, length: int) -> None:
    inputs = make_inputs(name, 2, 80, N=2)
    whole = run(name, inputs)
    o1, state = run(name, [*cut(name, inputs, 0, length), inputs[-1]])
    o2, final = run(name, [*cut(name, inputs, length, 80), state])
    parts = torch.cat([o1, o2], dim=1), final
    assert_close(parts, whole)
    assert_close(gradients(parts, inputs), gradients(whole, inputs))


@each
def test_only_the_final_state_is_used(name: str) -> None:
    inputs = make_inputs(name, 1, 40, N=1)
    _, expected = define(name, inputs)
    _, actual = run(name, inputs)
    assert_close(
        torch.autograd.grad(actual.square().sum(), inputs[1:]),
        torch.autograd.grad(expected.square().sum(), inputs[1:]),
    )


@each
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_inputs_are_computed_in_fp32(name: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(name, 2, 70, N=2, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs, expected = run(name, inputs), define(name, exact)
    assert outputs[0].dtype == dtype and outputs[1].dtype == torch.float32
    grads, expected_grads = gradients(outputs, inputs), gradients(expected, exact)
    assert [x.dtype for x in grads] == [x.dtype for x in inputs]
    for a, e in zip((*outputs, *grads), (*expected, *expected_grads), strict=True):
        assert (a.double() - e).norm() / e.norm() < tolerance
    assert (outputs[1].double() - expected[1]).norm() / expected[1].norm() < 1e-5  # the state never leaves fp32


@each
@pytest.mark.parametrize("decay", ["near_one", "near_zero"])
def test_extreme_decays_neither_overflow_nor_leak(name: str, decay: Decay) -> None:
    inputs = make_inputs(name, 1, 100, N=1, dtype=torch.float32, decay=decay)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs, expected = run(name, inputs), define(name, exact)
    for a, e in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)
    grads, expected_grads = gradients(outputs, inputs), gradients(expected, exact)
    for a, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-3 * float(e.abs().max()))


@each
@pytest.mark.parametrize("packed, with_state", [(False, False), (False, True), (True, True)])
def test_opcheck(name: str, packed: bool, with_state: bool) -> None:
    cu_seqlens = torch.tensor([0, 1, 40, 40], dtype=torch.int32) if packed else None
    inputs = make_inputs(name, 1, 40, N=(3 if packed else 1) * with_state, dtype=torch.float32)
    operator = RECURRENCES[name].operator
    tokens, state = inputs[: operator.n_inputs], inputs[-1] if with_state else None
    for return_final_state in (False, True):
        args = (*tokens, state, cu_seqlens, None, SCALE, return_final_state, False, "reference")
        torch.library.opcheck(operator.op, args)


@each
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_into_one_graph(name: str, packed: bool) -> None:
    cu_seqlens = torch.tensor([0, 13, 40, 40], dtype=torch.int32) if packed else None

    def layer(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        o, final = run(name, [inputs[0].tanh(), *inputs[1:]], cu_seqlens)
        return o * 2, final

    torch._dynamo.reset()  # the other operators' graphs of this function would count towards its limit
    inputs = make_inputs(name, 1, 40, N=3 if packed else 1)
    expected = layer(*inputs)
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)
    assert_close(actual, expected)
    assert_close(gradients(actual, inputs), gradients(expected, inputs))


@each
@pytest.mark.parametrize("policy, n_forward", [("MUST_SAVE", 1), ("PREFER_RECOMPUTE", 2)])
def test_selective_checkpointing_can_name_it(
    name: str, policy: str, n_forward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = RECURRENCES[name].operator
    n_calls = 0

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        nonlocal n_calls
        n_calls += not torch._C._functorch.maybe_current_level()  # the backward runs it once more, inside vjp
        return reference(*args)

    reference = operator.reference
    monkeypatch.setattr(operator, "reference", counted)
    inputs = make_inputs(name, 1, 20)

    def contexts() -> Any:
        chosen = {operator.op._opoverload: CheckpointPolicy[policy]}
        return create_selective_checkpoint_contexts(
            lambda ctx, op, *args, **kwargs: chosen.get(op, CheckpointPolicy.PREFER_RECOMPUTE)
        )

    o = checkpoint(lambda *x: run(name, [x[0].tanh(), *x[1:]])[0], *inputs, use_reentrant=False, context_fn=contexts)
    grads = torch.autograd.grad(o.sum(), inputs)
    assert n_calls == n_forward
    plain = run(name, [inputs[0].tanh(), *inputs[1:]])[0]
    assert_close(grads, torch.autograd.grad(plain.sum(), inputs))


@each
@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "tritonn"}, "backend is 'tritonn'"),
        ({"q": torch.zeros(1, 7, 2, 6)}, r"q and k are \(B, L, H, K\)"),
        ({"k": torch.zeros(1, 8, 2, 6, dtype=torch.bfloat16)}, "share one dtype"),
        ({"initial_state": "bfloat16"}, r"torch.float32, got .* torch.bfloat16"),
        ({"initial_state": "two"}, "2 rows for 1 sequences"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "number of tokens"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "int32"),
    ],
)
def test_errors_say_what_is_wrong(name: str, change: dict, message: str) -> None:
    operator, sizes = RECURRENCES[name].operator, sizes_of(name)
    states = {"bfloat16": torch.zeros(1, *sizes[1:], dtype=torch.bfloat16), "two": torch.zeros(2, *sizes[1:])}
    q, k, *rest = make_inputs(name, 1, 8, dtype=torch.float32)
    state = states.get(change.get("initial_state", ""))
    with pytest.raises(ValueError, match=f"{name}: .*{message}|cu_seqlens .*{message}"):
        operator(
            change.get("q", q),
            change.get("k", k),
            *rest,
            scale=None,
            initial_state=state,
            cu_seqlens=change.get("cu_seqlens"),
            chunk_indices=None,
            return_final_state=False,
            backend=change.get("backend", "reference"),
        )


@each
def test_fla_limits_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"up to 256 wide.*kernels.backend=reference"):
        RECURRENCES[name].operator(
            *make_inputs(name, 1, 8),
            scale=None,
            initial_state=None,
            cu_seqlens=None,
            chunk_indices=None,
            return_final_state=False,
            backend="fla",
        )
