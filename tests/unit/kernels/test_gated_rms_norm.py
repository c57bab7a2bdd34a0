from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.gated_rms_norm import _gated_rms_norm, gated_rms_norm

EPS = 1e-5


def make_inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    x, gate, weight = (torch.randn(s, dtype=dtype) for s in (shape, shape, shape[-1:]))
    return [t.requires_grad_() for t in (x, gate, weight)]


def truth(x: Tensor, gate: Tensor, weight: Tensor, activation: str) -> Tensor:
    act = {"silu": F.silu, "sigmoid": torch.sigmoid}[activation]
    return F.rms_norm(x, x.shape[-1:], weight, EPS) * act(gate)


def gradients(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(y, inputs, torch.randn(y.shape, dtype=torch.float64).to(y.dtype))


@pytest.mark.parametrize("shape", [(3, 7, 2, 8), (5, 6), (1, 1, 1, 3)])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_matches_torch_rms_norm(shape: tuple[int, ...], activation: str) -> None:
    inputs = make_inputs(*shape)
    expected = truth(*inputs, activation)
    actual = gated_rms_norm(*inputs, eps=EPS, activation=activation, backend="reference")
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))


def test_bf16_is_computed_in_fp32() -> None:
    inputs = make_inputs(4, 9, 16, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    actual = gated_rms_norm(*inputs, eps=EPS, backend="reference")
    expected = truth(*exact, "silu")
    torch.testing.assert_close(actual, expected.to(torch.bfloat16), rtol=0, atol=0)
    for a, e in zip(gradients(actual, inputs), gradients(expected, exact), strict=True):
        assert a.dtype == torch.bfloat16 and (a.double() - e).norm() / e.norm() < 5e-3


def test_non_contiguous_inputs() -> None:
    inputs = make_inputs(4, 6, 8)
    x, gate, weight = inputs
    expected = truth(x.transpose(0, 1), gate.transpose(0, 1), weight, "silu")
    actual = gated_rms_norm(x.transpose(0, 1), gate.transpose(0, 1), weight, eps=EPS, backend="reference")
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_opcheck(activation: str) -> None:
    inputs = make_inputs(2, 5, 8, dtype=torch.float32)
    torch.library.opcheck(_gated_rms_norm, (*inputs, EPS, activation, "reference"))


def test_compiles_into_one_graph() -> None:
    inputs = make_inputs(2, 5, 8)

    def layer(x, gate, weight):
        return gated_rms_norm(x.sin(), gate, weight, eps=EPS, backend="reference") * 3

    expected = layer(*inputs)
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "auto"}, "backend is 'auto'"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"gate": torch.zeros(2, 3)}, r"weight is \(D,\)"),
        ({"weight": torch.zeros(7)}, r"weight is \(D,\)"),
        ({"backend": "fla", "x": torch.zeros(2, 5, 8, dtype=torch.float64)}, "kernels.backend=reference"),
    ],
)
def test_errors_say_what_is_wrong(change: dict, message: str) -> None:
    x, gate, weight = make_inputs(2, 5, 8, dtype=torch.float32)
    kwargs = {"x": x, "gate": gate, "weight": weight, "eps": EPS, "backend": "reference"} | change
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**kwargs)
