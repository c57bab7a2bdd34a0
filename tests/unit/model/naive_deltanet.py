"""DeltaNet as its paper writes it (arXiv 2406.06484, equation 2): a state matrix per head, one token at a time."""

from __future__ import annotations

import math

import numpy as np
from naive_math import Array, convolved, rms_norm, sigmoid, silu, unit

from lt2titan.model.config import ModelConfig


def deltanet(p: dict[str, Array], xs: list[Array], config: ModelConfig, carry: dict[str, list[Array]]) -> list[Array]:
    own = config.mixers.deltanet
    beta_max = 2.0 if own.allow_neg_eigval else 1.0
    qs, ks, vs = ([silu(x) for x in convolved(p[f"{n}_conv"], [p[f"{n}_proj.weight"] @ x for x in xs])] for n in "qkv")
    dk, dv = len(qs[0]) // own.n_heads, len(vs[0]) // own.n_heads
    states = [np.zeros((dk, dv)) for _ in range(own.n_heads)]
    ys = []
    for t, x in enumerate(xs):
        b = p["b_proj.weight"] @ x
        heads = []
        for h in range(own.n_heads):
            q, k = (unit(tokens[t][h * dk : (h + 1) * dk]) for tokens in (qs, ks))
            beta, v = beta_max * sigmoid(b[h]), vs[t][h * dv : (h + 1) * dv]
            # What the state answers to k moves towards v by beta.
            states[h] = states[h] + np.outer(k, beta * (v - states[h].T @ k))
            heads.append(rms_norm(states[h].T @ q / math.sqrt(dk), p["o_norm"], config.norm_eps))
        ys.append(p["o_proj.weight"] @ np.concatenate(heads))
    return ys
