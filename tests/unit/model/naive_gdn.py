"""The gated delta network as its paper writes it (arXiv 2412.06464): a state matrix per head, one token at a time."""

from __future__ import annotations

import math

import numpy as np
from naive_math import Array, convolved, rms_norm, sigmoid, silu, unit

from lt2titan.model.config import ModelConfig


def gdn(p: dict[str, Array], xs: list[Array], config: ModelConfig, carry: dict[str, list[Array]]) -> list[Array]:
    own = config.mixers.gdn
    n_heads, n_v = own.n_heads, own.n_v_heads or own.n_heads
    beta_max = 2.0 if own.allow_neg_eigval else 1.0
    qs, ks, vs = ([silu(x) for x in convolved(p[f"{n}_conv"], [p[f"{n}_proj.weight"] @ x for x in xs])] for n in "qkv")
    dk, dv = len(qs[0]) // n_heads, len(vs[0]) // n_v
    states = [np.zeros((dk, dv)) for _ in range(n_v)]
    ys = []
    for t, x in enumerate(xs):
        a, b, gate = p["a_proj.weight"] @ x, p["b_proj.weight"] @ x, p["gate_proj.weight"] @ x
        heads = []
        for h in range(n_v):
            key_head = h // (n_v // n_heads)
            q = unit(qs[t][key_head * dk : (key_head + 1) * dk]) / math.sqrt(dk)
            k = unit(ks[t][key_head * dk : (key_head + 1) * dk])
            v = vs[t][h * dv : (h + 1) * dv]
            alpha = np.exp(-np.exp(p["A_log"][h]) * np.log1p(np.exp(a[h] + p["dt_bias"][h])))
            beta = beta_max * sigmoid(b[h])
            transition = alpha * (np.eye(dk) - beta * np.outer(k, k))
            states[h] = transition @ states[h] + beta * np.outer(k, v)
            o = rms_norm(states[h].T @ q, p["o_norm"], config.norm_eps)
            heads.append(o * silu(gate[h * dv : (h + 1) * dv]))
        ys.append(p["o_proj.weight"] @ np.concatenate(heads))
    return ys
