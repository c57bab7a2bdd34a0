"""Cases and error measures for the accelerated operators, shared by the CUDA tests and the CPU interpreter tests.

Every case runs an operator with backend 'fla', forward and backward through a random projection of all its outputs, and
compares with the fp64 reference on the same inputs (rounded to the case's dtype, then widened).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2titan.kernels.gated_delta_rule import gated_delta_rule
from lt2titan.kernels.gated_delta_rule.reference import chunked_gated_delta_rule
from lt2titan.kernels.gated_rms_norm import gated_rms_norm
from lt2titan.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.kernels.short_convolution import short_convolution
from lt2titan.kernels.short_convolution.reference import short_convolution_reference

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """`lengths` are packed documents in one row; otherwise (batch, length) rows. `sizes` are per operator."""

    operator: str
    dtype: torch.dtype
    sizes: dict[str, Any]
    batch: int = 1
    length: int = 0
    lengths: tuple[int, ...] = ()
    state: bool = False  # initial and final state
    host_chunks: bool = True  # pass chunk_indices made on the host

    @property
    def name(self) -> str:
        shape = f"documents{list(self.lengths)}" if self.lengths else f"{self.batch}x{self.length}"
        sizes = ",".join(f"{k}={v}" for k, v in self.sizes.items())
        parts = [self.operator, str(self.dtype).removeprefix("torch."), shape, sizes]
        return " ".join(parts + ["state"] * self.state + ["device-chunks"] * (not self.host_chunks))


def errors_of(case: Case, device: torch.device | str) -> dict[str, float]:
    """Run a case; return ||got - expected|| / ||expected|| for every output and gradient."""
    generator = torch.Generator().manual_seed(0)
    inputs, run, reference = _BUILD[case.operator](case, torch.device(device), generator)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    outputs, expected = run(inputs), reference(exact)
    weights = [torch.randn(o.shape, generator=generator).to(device) for o in expected]
    grads = torch.autograd.grad(outputs, list(inputs.values()), _like(weights, outputs))
    expected_grads = torch.autograd.grad(expected, list(exact.values()), _like(_like(weights, outputs), expected))
    names = [*("output", "final_state")[: len(outputs)], *(f"d{name}" for name in inputs)]
    pairs = zip(names, (*outputs, *grads), (*expected, *expected_grads), strict=True)
    return {name: _relative(got, want) for name, got, want in pairs}


def _like(weights: list[Tensor], outputs: Outputs) -> list[Tensor]:
    return [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)]


def _relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


Built = tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Outputs], Callable[[dict[str, Tensor]], Outputs]]


def _packing(case: Case, device: torch.device) -> tuple[int, int, int, Tensor | None, Tensor | None]:
    """B, L, number of sequences, cu_seqlens, chunk_indices."""
    if not case.lengths:
        return case.batch, case.length, case.batch, None, None
    cu_seqlens = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32)
    chunks = make_chunk_indices(cu_seqlens).to(device) if case.host_chunks else None
    return 1, sum(case.lengths), len(case.lengths), cu_seqlens.to(device), chunks


def _gated_delta_rule(case: Case, device: torch.device, generator: torch.Generator) -> Built:
    H, HV, K, V = (case.sizes[name] for name in ("H", "HV", "K", "V"))
    B, L, N, cu_seqlens, chunk_indices = _packing(case, device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "q": F.normalize(normal(B, L, H, K), dim=-1).to(case.dtype),
        "k": F.normalize(normal(B, L, H, K), dim=-1).to(case.dtype),
        "v": normal(B, L, HV, V).to(case.dtype),
        "g": F.logsigmoid(normal(B, L, HV) + 2),  # decays and strengths stay in fp32, as in the mixer
        "beta": 2 * normal(B, L, HV).sigmoid(),
    }
    if case.state:
        inputs["initial_state"] = normal(N, HV, K, V)
    inputs = {name: x.to(device).requires_grad_() for name, x in inputs.items()}

    def run(x: dict[str, Tensor]) -> Outputs:
        o, final_state = gated_delta_rule(
            **x,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
            return_final_state=case.state,
            backend="fla",
        )
        return (o,) if final_state is None else (o, final_state)

    def reference(x: dict[str, Tensor]) -> Outputs:
        tensors = [x[name] for name in ("q", "k", "v", "g", "beta")]
        o, final_state = chunked_gated_delta_rule(*tensors, x.get("initial_state"), cu_seqlens, K**-0.5)
        return (o, final_state) if case.state else (o,)

    return inputs, run, reference


def _short_convolution(case: Case, device: torch.device, generator: torch.Generator) -> Built:
    D, W = case.sizes["D"], case.sizes["W"]
    B, L, N, cu_seqlens, chunk_indices = _packing(case, device)
    inputs = {
        "x": torch.randn(B, L, D, generator=generator).to(case.dtype),
        "weight": torch.randn(D, W, generator=generator).to(case.dtype),
    }
    if case.sizes.get("bias"):
        inputs["bias"] = torch.randn(D, generator=generator).to(case.dtype)
    if case.state:
        inputs["initial_state"] = torch.randn(N, D, W - 1, generator=generator).to(case.dtype)
    inputs = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    activation = case.sizes.get("activation", "silu")

    def run(x: dict[str, Tensor]) -> Outputs:
        y, final_state = short_convolution(
            **x,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
            activation=activation,
            return_final_state=case.state,
            backend="fla",
        )
        return (y,) if final_state is None else (y, final_state)

    def reference(x: dict[str, Tensor]) -> Outputs:
        optional = x.get("bias"), x.get("initial_state")
        outputs = short_convolution_reference(x["x"], x["weight"], *optional, cu_seqlens, activation)
        return outputs if case.state else outputs[:1]

    return inputs, run, reference


def _gated_rms_norm(case: Case, device: torch.device, generator: torch.Generator) -> Built:
    H, D, activation = case.sizes["H"], case.sizes["D"], case.sizes["activation"]
    shapes = {"x": (case.batch, case.length, H, D), "gate": (case.batch, case.length, H, D), "weight": (D,)}
    inputs = {
        name: torch.randn(shape, generator=generator).to(case.dtype).to(device).requires_grad_()
        for name, shape in shapes.items()
    }

    def run(x: dict[str, Tensor]) -> Outputs:
        return (gated_rms_norm(**x, eps=1e-5, activation=activation, backend="fla"),)

    def reference(x: dict[str, Tensor]) -> Outputs:
        return (gated_rms_norm_reference(**x, eps=1e-5, activation=activation),)

    return inputs, run, reference


_BUILD = {
    "gated_delta_rule": _gated_delta_rule,
    "short_convolution": _short_convolution,
    "gated_rms_norm": _gated_rms_norm,
}
