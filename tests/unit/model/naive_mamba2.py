"""Mamba-2 as its paper writes it (arXiv 2405.21060, section 7): a state space per channel, one token at a time."""

from __future__ import annotations

import numpy as np
from naive_math import Array, convolved, rms_norm, silu

from lt2titan.model.config import ModelConfig


def mamba2(p: dict[str, Array], us: list[Array], config: ModelConfig, carry: dict[str, list[Array]]) -> list[Array]:
    own = config.mixers.mamba2
    xs, bs, cs = (
        [silu(x + p[f"{n}_conv_bias"]) for x in convolved(p[f"{n}_conv"], [p[f"{n}_proj.weight"] @ u for u in us])]
        for n in "xbc"
    )
    n_channels = len(xs[0])
    heads_per_group, channels_per_head = own.n_heads // own.n_groups, n_channels // own.n_heads
    states = np.zeros((n_channels, own.state_size))
    ys = []
    for t, u in enumerate(us):
        delta = np.log1p(np.exp(p["dt_proj.weight"] @ u + p["dt_bias"]))
        y = np.zeros(n_channels)
        for channel in range(n_channels):
            head = channel // channels_per_head
            group = slice((head // heads_per_group) * own.state_size, (head // heads_per_group + 1) * own.state_size)
            decay = np.exp(-np.exp(p["A_log"][head]) * delta[head])
            states[channel] = decay * states[channel] + delta[head] * bs[t][group] * xs[t][channel]
            y[channel] = cs[t][group] @ states[channel] + p["D"][head] * xs[t][channel]
        y = np.split(y * silu(p["gate_proj.weight"] @ u), own.n_groups)
        gains = np.split(p["o_norm"], own.n_groups)
        normed = [rms_norm(part, gain, config.norm_eps) for part, gain in zip(y, gains, strict=True)]
        ys.append(p["o_proj.weight"] @ np.concatenate(normed))
    return ys
