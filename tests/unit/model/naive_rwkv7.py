"""RWKV-7's time mixing as its paper writes it (arXiv 2503.14456, section 4): one token and one head at a time.

The state is the paper's, (value, key): S <- S (diag(w) - k'^T (a * k')) + v^T k, read as S r^T.
"""

from __future__ import annotations

import numpy as np
from naive_math import Array, sigmoid, unit

from lt2titan.model.config import ModelConfig


def rwkv7(p: dict[str, Array], xs: list[Array], config: ModelConfig, carry: dict[str, list[Array]]) -> list[Array]:
    width = config.mixers.rwkv7.head_dim
    n_heads = len(xs[0]) // width
    first_values = carry.get("rwkv7")
    states = [np.zeros((width, width)) for _ in range(n_heads)]
    values, ys = [], []
    for t, x in enumerate(xs):
        before = xs[t - 1] if t else np.zeros_like(x)
        x_r, x_w, x_k, x_v, x_a, x_g = ((1 - p[f"x_{n}"]) * x + p[f"x_{n}"] * before for n in "rwkvag")
        r, k, v = p["r_proj.weight"] @ x_r, p["k_proj.weight"] @ x_k, p["v_proj.weight"] @ x_v
        values.append(v)
        if first_values is not None:
            mix = sigmoid(_up(p, "v", _down(p, "v", x_v)) + p["v_bias"])
            v = (1 - mix) * v + mix * first_values[t]
        w = np.exp(-np.exp(-0.5) * sigmoid(_up(p, "w", np.tanh(_down(p, "w", x_w))) + p["w_bias"]))
        a = sigmoid(_up(p, "a", _down(p, "a", x_a)) + p["a_bias"])
        gate = _up(p, "gate", sigmoid(_down(p, "gate", x_g)))
        removal, k = k * p["k_k"], k * ((1 - p["k_a"]) + a * p["k_a"])
        out = []
        for h in range(n_heads):
            own = slice(h * width, (h + 1) * width)
            erase = unit(removal[own])
            states[h] = states[h] @ (np.diag(w[own]) - np.outer(erase, a[own] * erase)) + np.outer(v[own], k[own])
            y = states[h] @ r[own]
            y = (y - y.mean()) / np.sqrt(y.var() + width * config.norm_eps) * p["o_norm"][own] + p["o_norm_bias"][own]
            out.append(y + (r[own] * k[own] * p["r_k"][own]).sum() * v[own])
        ys.append(p["o_proj.weight"] @ (np.concatenate(out) * gate))
    if first_values is None:
        carry["rwkv7"] = values
    return ys


def _down(p: dict[str, Array], name: str, x: Array) -> Array:
    return p[f"{name}_lora.down_proj.weight"] @ x


def _up(p: dict[str, Array], name: str, x: Array) -> Array:
    return p[f"{name}_lora.up_proj.weight"] @ x
