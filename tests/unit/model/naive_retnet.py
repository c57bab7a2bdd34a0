"""Retention as its paper writes it (arXiv 2307.08621, equations 5 and 8): parallel sums over all earlier tokens."""

from __future__ import annotations

import math

import numpy as np
from naive_math import Array, rms_norm, rotate, silu

from lt2titan.model.config import ModelConfig


def retnet(p: dict[str, Array], xs: list[Array], config: ModelConfig, carry: dict[str, list[Array]]) -> list[Array]:
    n_heads, theta = config.mixers.retnet.n_heads, config.rope_theta
    qs, ks, vs = ([np.split(p[f"{n}_proj.weight"] @ x, n_heads) for x in xs] for n in "qkv")
    ys = []
    for n, x in enumerate(xs):
        gates = np.split(p["gate_proj.weight"] @ x, n_heads)
        heads = []
        for h in range(n_heads):
            gamma = 1 - 2.0 ** (-5 - h)
            q = rotate(qs[n][h], n, theta) / math.sqrt(len(qs[n][h]))
            o = sum(gamma ** (n - m) * (q @ rotate(ks[m][h], m, theta)) * vs[m][h] for m in range(n + 1))
            heads.append(rms_norm(o, p["o_norm"], config.norm_eps) * silu(gates[h]))
        ys.append(p["o_proj.weight"] @ np.concatenate(heads))
    return ys
