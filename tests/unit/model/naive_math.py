"""Building blocks of the naive implementation: vectors in fp64, one token at a time."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean() + eps) * weight


def rotate(x: Array, position: int, theta: float) -> Array:
    """Turn each pair (i, i + D/2) as a complex number, cosines and sines rounded to fp32 as the tables are."""
    half = len(x) // 2
    angle = position * theta ** (-np.arange(half) / half)
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle).astype(np.complex64).astype(np.complex128)
    return np.concatenate([turned.real, turned.imag])


def unit(x: Array) -> Array:
    return x / np.sqrt((x**2).sum() + 1e-6)


def convolved(taps: Array, xs: list[Array]) -> list[Array]:
    """Causal convolution per channel, taps (D, W), the last tap on the token itself."""
    inputs = [np.zeros(len(taps))] * (taps.shape[1] - 1) + xs
    return [sum(taps[:, j] * inputs[t + j] for j in range(taps.shape[1])) for t in range(len(xs))]
