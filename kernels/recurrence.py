"""A linear recurrence as a torch operator: `lt2titan::<name>` with its fake, its backward and its autograd formula.

Every recurrence here maps per-token tensors, the first three of them q, k and v, and one state per sequence to outputs
and final states. What torch.library wants to know of such an operator is the same for all of them and is said once,
here; a folder of `kernels/` adds the equation (`reference.py`), the GPU kernels (`fla.py`) and the public function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lt2titan.kernels.packing import check_packed

FLA_MAX_KEY_WIDTH = 256
RECURRENT_MAX_LENGTH = 16  # without gradients, up to here fla's single recurrent kernel replaces the chunked ones

Reference = Callable[[Sequence[Tensor], Tensor | None, Tensor | None, float], tuple[Tensor, Tensor]]
"""(inputs, initial_state, cu_seqlens, scale) -> (output in v's dtype, final state in fp32 or fp64)."""


class GpuKernels(Protocol):
    """What `fla.py` of a recurrence provides; `inputs` are the per-token tensors in the operator's order."""

    def forward_chunked(
        self,
        inputs: Sequence[Tensor],
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_indices: Tensor | None,
        scale: float,
        return_final_state: bool,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Return output, final state (or None), and what the backward needs beside the inputs."""
        ...

    def forward_recurrent(
        self, inputs: Sequence[Tensor], initial_state: Tensor | None, scale: float, return_final_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One kernel that walks over the tokens of dense rows: for a few tokens without gradients (decoding)."""
        ...

    def backward_chunked(
        self,
        do: Tensor,
        dfinal_state: Tensor | None,
        inputs: Sequence[Tensor],
        initial_state: Tensor | None,
        saved: Sequence[Tensor],
        cu_seqlens: Tensor | None,
        chunk_indices: Tensor | None,
        scale: float,
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Return the gradients of the inputs and of initial_state (or None)."""
        ...

    def empty_saved(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Uninitialised tensors like those that forward_chunked saves."""
        ...


class Recurrence:
    """The operator `lt2titan::<name>`; call it with the checked inputs.

    Args:
        name: of the operator.
        inputs: names of the per-token tensors, q, k and v first; q (B, L, H, K), v (B, L, HV, V).
        reference: the equation in plain PyTorch.
        gpu: the GPU kernels.
        n_saved: tensors that `gpu.forward_chunked` saves.
    """

    def __init__(self, name: str, inputs: Sequence[str], reference: Reference, gpu: GpuKernels, n_saved: int) -> None:
        self.name, self.input_names = name, tuple(inputs)
        self.n_inputs, self.n_saved = len(inputs), n_saved
        self.reference, self.gpu = reference, gpu
        tensors = ", ".join(f"Tensor {n}" for n in inputs)
        packing = "Tensor? initial_state, Tensor? cu_seqlens, Tensor? chunk_indices"
        saved = ", ".join(f"Tensor saved_{i}" for i in range(n_saved)) + ", " if n_saved else ""
        self.op = torch.library.custom_op(
            f"lt2titan::{name}",
            self._forward,
            mutates_args=(),
            schema=f"({tensors}, {packing}, float scale, bool return_final_state, bool recurrent, str backend)"
            f" -> ({', '.join(['Tensor'] * (2 + n_saved))})",
        )
        self.backward_op = torch.library.custom_op(
            f"lt2titan::{name}_backward",
            self._backward,
            mutates_args=(),
            schema=f"(Tensor? do, Tensor? dfinal_state, {tensors}, {packing}, {saved}float scale, str backend)"
            f" -> ({', '.join(['Tensor'] * (len(inputs) + 1))})",
        )
        self.op.register_fake(self._fake)
        self.backward_op.register_fake(self._backward_fake)
        self.op.register_autograd(self._autograd, setup_context=self._setup_context)

    def __call__(
        self,
        *inputs: Tensor,
        scale: float | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_indices: Tensor | None,
        return_final_state: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        """(output (B, L, HV, V) in v's dtype, final state (N, HV, K, V) in fp32 or fp64, or None).

        Raises:
            ValueError: q, k, v, the state or the packing do not fit together, or the backend does not take them.
        """
        self._check(inputs, initial_state, backend)
        q = inputs[0]
        check_packed(self.name, q.shape[0], cu_seqlens, initial_state)
        needs_grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (*inputs, initial_state)
        )
        recurrent = not needs_grad and cu_seqlens is None and q.shape[1] <= RECURRENT_MAX_LENGTH
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        o, final_state, *_ = self.op(
            *inputs, initial_state, cu_seqlens, chunk_indices, scale, return_final_state, recurrent, backend
        )
        return o, final_state if return_final_state else None

    def _split(self, args: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Any]]:
        return args[: self.n_inputs], args[self.n_inputs :]

    def _forward(self, *args: Any) -> tuple[Tensor, ...]:
        """Output, final state, and what the GPU backward needs; empty where unused."""
        inputs, rest = self._split(args)
        initial_state, cu_seqlens, chunk_indices, scale, return_final_state, recurrent, backend = rest
        final_state: Tensor | None
        saved = [inputs[0].new_empty(0) for _ in range(self.n_saved)]
        if backend == "reference":
            o, final_state = self.reference(inputs, initial_state, cu_seqlens, scale)
        elif recurrent:
            o, final_state = self.gpu.forward_recurrent(inputs, initial_state, scale, return_final_state)
        else:
            o, final_state, saved = self.gpu.forward_chunked(
                inputs, initial_state, cu_seqlens, chunk_indices, scale, return_final_state
            )
        if final_state is None or not return_final_state:
            final_state = inputs[0].new_empty(0, dtype=state_dtype(inputs[0]))
        return o.contiguous(), final_state.contiguous(), *saved

    def _fake(self, *args: Any) -> tuple[Tensor, ...]:
        inputs, (_, cu_seqlens, _, _, return_final_state, recurrent, backend) = self._split(args)
        q, v = inputs[0], inputs[2]
        B, _, HV, V = v.shape
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state_shape = (N, HV, q.shape[-1], V) if return_final_state else (0,)
        if backend == "fla" and not recurrent:
            saved = self.gpu.empty_saved(inputs)
        else:
            saved = [q.new_empty(0) for _ in range(self.n_saved)]
        return v.new_empty(v.shape), v.new_empty(state_shape, dtype=state_dtype(q)), *saved

    def _backward(self, *args: Any) -> tuple[Tensor, ...]:
        """Gradients of the inputs and of initial_state (empty if there is none)."""
        do, dfinal_state, *rest = args
        inputs, (initial_state, cu_seqlens, chunk_indices, *saved, scale, backend) = self._split(rest)
        do = torch.zeros_like(inputs[2]) if do is None else do
        grads: Sequence[Tensor]
        if backend == "reference":

            def forward(*primals: Tensor) -> tuple[Tensor, Tensor]:
                state = None if initial_state is None else primals[-1]
                return self.reference(primals[: self.n_inputs], state, cu_seqlens, scale)

            primals = inputs if initial_state is None else [*inputs, initial_state]
            (_, final_state), pullback = torch.func.vjp(forward, *primals)[:2]
            dfinal_state = torch.zeros_like(final_state) if dfinal_state is None else dfinal_state
            grads = pullback((do, dfinal_state))
            dinitial_state = None if initial_state is None else grads[-1]
        else:
            grads, dinitial_state = self.gpu.backward_chunked(
                do, dfinal_state, inputs, initial_state, saved, cu_seqlens, chunk_indices, scale
            )
        if dinitial_state is None:
            dinitial_state = do.new_empty(0, dtype=state_dtype(inputs[0]))
        dinputs = (grad.to(x.dtype).contiguous() for grad, x in zip(grads, inputs, strict=False))
        return *dinputs, dinitial_state.contiguous()

    def _backward_fake(self, *args: Any) -> tuple[Tensor, ...]:
        inputs, (initial_state, *_) = self._split(args[2:])
        state_shape = (0,) if initial_state is None else initial_state.shape
        return *(x.new_empty(x.shape) for x in inputs), inputs[0].new_empty(state_shape, dtype=state_dtype(inputs[0]))

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, scale, return_final_state, recurrent, backend = inputs
        _, final_state, *saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved, *([] if return_final_state else [final_state]))
        ctx.save_for_backward(*tensors, *saved)
        ctx.scale, ctx.recurrent, ctx.backend = scale, recurrent, backend

    def _autograd(self, ctx: Any, do: Tensor | None, dfinal_state: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if ctx.recurrent and ctx.backend == "fla":
            raise RuntimeError(f"{self.name}: the recurrent kernel has no backward; pass recurrent=False")
        saved = ctx.saved_tensors  # once: under activation checkpointing a second unpacking is an error
        has_state = saved[self.n_inputs] is not None
        *grads, dinitial_state = self.backward_op(do, dfinal_state, *saved, ctx.scale, ctx.backend)
        return *grads, dinitial_state if has_state else None, None, None, None, None, None, None

    def _check(self, inputs: Sequence[Tensor], initial_state: Tensor | None, backend: str) -> None:
        name, (q, k, v, *_) = self.name, inputs
        if backend not in ("reference", "fla"):
            raise ValueError(f"{name}: backend is {backend!r}, must be 'reference' or 'fla' (see resolve_backend)")
        if q.dim() != 4 or v.dim() != 4 or q.shape != k.shape or q.shape[:2] != v.shape[:2]:
            raise ValueError(f"{name}: q and k are (B, L, H, K) and v is (B, L, HV, V), got {shapes(q, k, v)}")
        if q.shape[1] == 0:
            raise ValueError(f"{name}: no tokens (L = 0)")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"{name}: q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
        if initial_state is not None:
            expected = (v.shape[2], k.shape[-1], v.shape[-1])
            if initial_state.shape[1:] != expected or initial_state.dtype != state_dtype(q):
                raise ValueError(
                    f"{name}: initial_state is (N, HV, K, V) = (N, {', '.join(map(str, expected))}) in "
                    f"{state_dtype(q)}, got {tuple(initial_state.shape)} in {initial_state.dtype}"
                )
        if backend == "fla" and (k.shape[-1] > FLA_MAX_KEY_WIDTH or q.dtype == torch.float64):
            raise ValueError(
                f"{name}: fla takes key heads up to {FLA_MAX_KEY_WIDTH} wide in bf16, fp16 or fp32, got "
                f"{k.shape[-1]} in {q.dtype}; use narrower heads or kernels.backend=reference"
            )


def check_shape(name: str, what: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Raise a ValueError unless ``tensor`` has the ``expected`` shape, written as ``meaning``."""
    if tensor.shape != torch.Size(expected):
        raise ValueError(f"{name}: {what} is {meaning} = {tuple(expected)}, got {tuple(tensor.shape)}")


def state_dtype(x: Tensor) -> torch.dtype:
    """States are kept in fp32, and in fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)
