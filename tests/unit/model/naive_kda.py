"""Kimi delta attention as its paper writes it (arXiv 2510.26692): a state matrix per head, one token at a time."""

from __future__ import annotations

import math

import numpy as np
from naive_math import Array, convolved, rms_norm, sigmoid, silu, unit

from lt2titan.model.config import ModelConfig


def kda(p: dict[str, Array], xs: list[Array], config: ModelConfig, carry: dict[str, list[Array]]) -> list[Array]:
    own = config.mixers.kda
    n_heads, n_v = own.n_heads, own.n_v_heads or own.n_heads
    beta_max = 2.0 if own.allow_neg_eigval else 1.0
    qs, ks, vs = ([silu(x) for x in convolved(p[f"{n}_conv"], [p[f"{n}_proj.weight"] @ x for x in xs])] for n in "qkv")
    dk, dv = len(qs[0]) // n_heads, len(vs[0]) // n_v
    states = [np.zeros((dk, dv)) for _ in range(n_v)]
    ys = []
    for t, x in enumerate(xs):
        f = p["a_up_proj.weight"] @ (p["a_down_proj.weight"] @ x) + p["dt_bias"]
        gate = sigmoid(p["gate_up_proj.weight"] @ (p["gate_down_proj.weight"] @ x) + p["gate_bias"])
        betas = beta_max * sigmoid(p["b_proj.weight"] @ x)
        heads = []
        for h in range(n_v):
            key_head = h // (n_v // n_heads)
            q = unit(qs[t][key_head * dk : (key_head + 1) * dk]) / math.sqrt(dk)
            k = unit(ks[t][key_head * dk : (key_head + 1) * dk])
            v = vs[t][h * dv : (h + 1) * dv]
            rate, own_f = np.exp(p["A_log"][h]), f[h * dk : (h + 1) * dk]
            if own.bounded_gate:
                alpha = np.exp(own.lower_bound * sigmoid(rate * own_f))
            else:
                alpha = np.exp(-rate * np.log1p(np.exp(own_f)))
            transition = (np.eye(dk) - betas[h] * np.outer(k, k)) @ np.diag(alpha)
            states[h] = transition @ states[h] + betas[h] * np.outer(k, v)
            o = rms_norm(states[h].T @ q, p["o_norm"], config.norm_eps)
            heads.append(o * gate[h * dv : (h + 1) * dv])
        ys.append(p["o_proj.weight"] @ np.concatenate(heads))
    return ys
