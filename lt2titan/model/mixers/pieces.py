"""What several linear mixers share: recurrences and convolutions with their states, norms, decays, initial values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2titan.kernels.short_convolution import short_convolution
from lt2titan.model.context import Context
from lt2titan.model.mixers.base import State, StateSpec
from lt2titan.model.precision import precise
from lt2titan.model.shares import Share, all_sum, local
from lt2titan.model.stretch import recur_across, tokens_before

CHUNK = 64
"""Tokens per chunk that FLOPs of recurrences are counted for."""


def convolve(mixer: nn.Module, letters: str, *inputs: Tensor, context: Context, state: State | None) -> list[Tensor]:
    """silu(weight (D, W) * x (B, L, D) + bias (D,)) of each input: causal depthwise convolutions within each document.

    Their weights, and biases where they have one, are the mixer's, by ``letters``: q_conv, k_conv and v_conv for "qkv".
    The last W - 1 inputs are read from and written to ``state["q_conv"]`` (B, D, W - 1); see `convolution_spec`. Those
    on earlier ranks come in one gather for all.
    """
    weights = convolutions(mixer, letters)
    taps: list[Tensor | None] = [None if state is None else state[name] for name in weights]
    if context.stretch is not None:
        n = next(iter(weights.values())).shape[1] - 1
        taps = [x.mT for x in tokens_before(inputs, n, context.stretch, context.cu_seqlens)]
    outputs = []
    for x, (name, weight), before in zip(inputs, weights.items(), taps, strict=True):
        bias = getattr(mixer, f"{name}_bias", None)
        y, final_taps = short_convolution(
            x,
            local(weight),
            bias=None if bias is None else local(bias),
            initial_state=before,
            cu_seqlens=context.cu_seqlens,
            chunk_indices=context.chunk_indices,
            activation="silu",
            return_final_state=state is not None,
            backend=mixer.backend,  # type: ignore[arg-type]
        )
        if state is not None and final_taps is not None:
            state[name].copy_(final_taps)
        outputs.append(y)
    return outputs


def recur(
    recurrence: Callable[..., tuple[Tensor, Tensor | None]],
    *inputs: Tensor,
    context: Context,
    state: State | None,
    backend: str,
    **options: Any,
) -> Tensor:
    """A recurrence of kernels/ over the per-token ``inputs``, within each document.

    Continues ``state["recurrent"]`` (B, HV, K, V) and leaves the final states there; see `recurrent_spec`.
    """
    if context.stretch is not None:
        return recur_across(
            recurrence,
            *inputs,
            stretch=context.stretch,
            cu_seqlens=context.cu_seqlens,
            chunk_indices=context.chunk_indices,
            backend=backend,
            **options,
        )
    y, final_state = recurrence(
        *inputs,
        initial_state=None if state is None else state["recurrent"],
        cu_seqlens=context.cu_seqlens,
        chunk_indices=context.chunk_indices,
        return_final_state=state is not None,
        backend=backend,
        **options,
    )
    if state is not None and final_state is not None:
        state["recurrent"].copy_(final_state)
    return y


def recurrent_spec(batch_size: int, n_heads: int, k: int, v: int, **convolutions: Tensor) -> dict[str, StateSpec]:
    """The decode state of `recur`, and of `convolve` for the named weights."""
    spec = {"recurrent": StateSpec((batch_size, n_heads, k, v), torch.float32)}
    return spec | {name: convolution_spec(weight, batch_size) for name, weight in convolutions.items()}


def convolution_spec(weight: Tensor, batch_size: int) -> StateSpec:
    """The decode state of `convolve`."""
    n_channels, n_taps = weight.shape
    return StateSpec((batch_size, n_channels, n_taps - 1))


def l2_norm(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, 1e-6 under the root keeping a zero vector zero.

    Written as an RMS norm, which torch has as one kernel that computes in fp32 and keeps no fp32 copy of x.
    """
    width = x.shape[-1]
    return F.rms_norm(x, (width,), eps=1e-6 / width) * width**-0.5


def shared_rms_norm(x: Tensor, weight: Tensor | None, eps: float, share: Share, n_sharing: int = 0) -> Tensor:
    """RMS norm of x (B, L, D) over channels of which this rank has D, and weight (D,) of them.

    Args:
        n_sharing: neighbouring ranks that have the normed channels together; 0 means all of ``share``.
    """
    if share.n_ranks == 1:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    n_sharing = n_sharing or share.n_ranks
    wide = precise(x)
    squares = wide.square().sum(dim=-1, keepdim=True)
    # One sum over all ranks, with a place for each set of them: the sets need no process groups.
    place, n_places = share.rank // n_sharing, share.n_ranks // n_sharing
    sums = all_sum(F.pad(squares, (place, n_places - 1 - place)), share)
    mean = sums[..., place : place + 1] / (n_sharing * x.shape[-1])
    y = (wide * torch.rsqrt(mean + eps)).to(x.dtype)
    return y if weight is None else y * weight


def convolutions(mixer: nn.Module, letters: str) -> dict[str, Tensor]:
    """The weights of a mixer's convolutions, by the names of their states: q_conv, k_conv and v_conv for "qkv"."""
    return {f"{letter}_conv": getattr(mixer, f"{letter}_conv") for letter in letters}


def rate_log_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """-exp(A_log) softplus(a + dt_bias), the logarithm of a decay, at least in fp32."""
    return -precise(A_log).exp() * F.softplus(precise(a) + precise(dt_bias))


def sigmoid_beta(b: Tensor, maximum: float) -> Tensor:
    """maximum * sigmoid(b), at least in fp32: the writing strength of a delta rule."""
    return maximum * torch.sigmoid(precise(b))


def gla_flops(k: int, v: int) -> float:
    """Forward FLOPs per head and token of S <- Diag(a) S + k v^T in chunks of C, key and value heads k and v wide:
    q k^T (2Ck), the scores' product with v (2Cv), and two products with the state (2kv each)."""
    return 2 * CHUNK * (k + v) + 4 * k * v


def delta_rule_flops(k: int, v: int) -> float:
    """Forward FLOPs per head and token of a delta rule in chunks of C, key and value heads k and v wide:
    q k^T, k k^T, and the inverse's products with k (2Ck each) and v (2Cv), the scores' product with v (2Cv), and
    three products with the state (2kv each)."""
    return 6 * CHUNK * k + 4 * CHUNK * v + 6 * k * v


def init_convolution(tensor: Tensor, n_taps: int, generator: torch.Generator) -> None:
    """Weights (D, W) or a bias (D,) of a depthwise convolution with W = ``n_taps``, as torch's Conv1d starts."""
    bound = n_taps**-0.5
    tensor.uniform_(-bound, bound, generator=generator)


def init_A_log(tensor: Tensor, low: float, generator: torch.Generator) -> None:
    """log U(low, 16)."""
    tensor.uniform_(low, 16.0, generator=generator).clamp_(min=1e-6).log_()


def init_dt_bias(tensor: Tensor, generator: torch.Generator) -> None:
    """The inverse softplus of a log-uniform draw from [1e-3, 1e-1], floored at 1e-4."""
    dt = tensor.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_().clamp_(min=1e-4)
    dt.copy_(dt + torch.log(-torch.expm1(-dt)))
