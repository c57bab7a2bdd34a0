from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.short_convolution import _short_convolution, short_convolution

DOCUMENTS = [0, 1, 3, 3, 20, 24, 26, 26]  # lengths 1, 2, 0, 17, 4, 2, 0
D = 5


def make_inputs(
    B: int, L: int, W: int = 4, *, N: int = 0, bias: bool = True, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(B, L, D, dtype=dtype), "weight": torch.randn(D, W, dtype=dtype)}
    if bias:
        inputs["bias"] = torch.randn(D, dtype=dtype)
    if N:
        inputs["initial_state"] = torch.randn(N, D, W - 1, dtype=dtype)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def truth(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """PyTorch's grouped convolution over the state followed by the input."""
    history = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], D, history)
    extended = torch.cat([initial_state, x.mT], dim=-1)
    y = F.conv1d(extended, weight[:, None], bias, groups=D).mT
    return (F.silu(y) if activation else y), extended[:, :, extended.shape[-1] - history :]


def gradients(outputs: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    loss = sum((o * torch.randn(o.shape, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(loss, list(inputs.values()))


def assert_close(actual, expected, tolerance: float = 1e-12) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("L", [1, 2, 3, 30])
@pytest.mark.parametrize("W", [2, 4])
@pytest.mark.parametrize(
    "bias, with_state, activation", [(True, True, "silu"), (False, False, "silu"), (False, True, "")]
)
def test_matches_conv1d(L: int, W: int, bias: bool, with_state: bool, activation: str) -> None:
    inputs = make_inputs(2, L, W, N=2 * with_state, bias=bias)
    expected = truth(**inputs, activation=activation)
    actual = short_convolution(**inputs, activation=activation, return_final_state=True, backend="reference")
    assert_close(actual, expected)
    assert_close(gradients(actual, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_documents_match_each_document_alone(with_state: bool) -> None:
    N = len(DOCUMENTS) - 1
    inputs = make_inputs(1, DOCUMENTS[-1], N=N * with_state)
    packed = short_convolution(
        **inputs,
        cu_seqlens=torch.tensor(DOCUMENTS, dtype=torch.int32),
        return_final_state=True,
        backend="reference",
    )
    outputs, finals = [], []
    for n, (start, end) in enumerate(pairwise(DOCUMENTS)):
        state = inputs["initial_state"][n : n + 1] if with_state else torch.zeros(1, D, 3, dtype=torch.float64)
        if start < end:
            y, state = truth(inputs["x"][:, start:end], inputs["weight"], inputs["bias"], state)
            outputs.append(y)
        finals.append(state)
    alone = torch.cat(outputs, dim=1), torch.cat(finals)
    assert_close(packed, alone)
    assert_close(gradients(packed, inputs), gradients(alone, inputs))


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_split_with_carried_state_equals_the_whole(cut: int) -> None:
    inputs = make_inputs(2, 12, N=2)
    rest = {"weight": inputs["weight"], "bias": inputs["bias"], "return_final_state": True, "backend": "reference"}
    x, state = inputs["x"], inputs["initial_state"]
    whole = short_convolution(x, initial_state=state, **rest)
    y1, state = short_convolution(x[:, :cut], initial_state=state, **rest)
    y2, final = short_convolution(x[:, cut:], initial_state=state, **rest)
    parts = torch.cat([y1, y2], dim=1), final
    assert_close(parts, whole)
    assert_close(gradients(parts, inputs), gradients(whole, inputs))


def test_bf16_is_computed_in_fp32() -> None:
    inputs = make_inputs(2, 50, N=2, dtype=torch.bfloat16)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    actual = short_convolution(**inputs, return_final_state=True, backend="reference")
    expected = truth(**exact)
    assert actual[0].dtype == actual[1].dtype == torch.bfloat16
    torch.testing.assert_close(actual[0], expected[0].to(torch.bfloat16), rtol=0, atol=0)
    torch.testing.assert_close(actual[1], expected[1].to(torch.bfloat16), rtol=0, atol=0)
    for a, e in zip(gradients(actual, inputs), gradients(expected, exact), strict=True):
        assert a.dtype == torch.bfloat16 and (a.double() - e).norm() / e.norm() < 5e-3


@pytest.mark.parametrize("packed, with_state, bias", [(False, False, False), (False, True, True), (True, True, False)])
def test_opcheck(packed: bool, with_state: bool, bias: bool) -> None:
    cu_seqlens = torch.tensor([0, 1, 9, 9], dtype=torch.int32) if packed else None
    inputs = make_inputs(1, 9, N=(3 if packed else 1) * with_state, bias=bias, dtype=torch.float32)
    tensors = [inputs.get(name) for name in ("x", "weight", "bias", "initial_state")]
    for activation, return_final_state in (("silu", False), ("", True)):
        args = (*tensors, cu_seqlens, None, activation, return_final_state, "reference")
        torch.library.opcheck(_short_convolution, args)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_into_one_graph(packed: bool) -> None:
    cu_seqlens = torch.tensor([0, 3, 9, 9], dtype=torch.int32) if packed else None
    inputs = make_inputs(1, 9, N=3 if packed else 1)

    def layer(x, weight, bias, initial_state):
        y, final = short_convolution(
            x.sin(),
            weight,
            bias=bias,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
            backend="reference",
        )
        return y + 1, final

    expected = layer(**inputs)
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(**inputs)
    assert_close(actual, expected)
    assert_close(gradients(actual, inputs), gradients(expected, inputs))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"weight": torch.zeros(4, D)}, r"weight is \(D, W\)"),
        ({"bias": torch.zeros(D + 1)}, r"bias is \(D,\)"),
        ({"initial_state": torch.zeros(1, D, 4)}, r"initial_state is \(N, D, W - 1\)"),
        ({"initial_state": torch.zeros(3, D, 3)}, "3 rows for 1 sequences"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 6])}, "must rise from 0"),
    ],
)
def test_errors_say_what_is_wrong(change: dict, message: str) -> None:
    kwargs = make_inputs(1, 6, dtype=torch.float32) | {"backend": "reference"} | change
    with pytest.raises(ValueError, match=message):
        short_convolution(**kwargs)
