"""Softmax attention for one document, one query at a time."""

from __future__ import annotations

import math

import numpy as np
from naive_math import Array, rotate, sigmoid


def softmax_attention(
    p: dict[str, Array], prefix: str, xs: list[Array], n_heads: int, n_kv: int, window: int, theta: float
) -> list[Array]:
    width = len(xs[0]) // n_heads
    qs, ks, vs = [], [], []
    for t, x in enumerate(xs):
        q, k, v = (p[f"{prefix}.{n}_proj.weight"] @ x for n in "qkv")
        qs.append([rotate(q[h * width : (h + 1) * width], t, theta) for h in range(n_heads)])
        ks.append([rotate(k[h * width : (h + 1) * width], t, theta) for h in range(n_kv)])
        vs.append([v[h * width : (h + 1) * width] for h in range(n_kv)])
    ys = []
    for t, x in enumerate(xs):
        seen = range(max(0, t - window + 1) if window else 0, t + 1)
        heads = []
        for h in range(n_heads):
            kv = h // (n_heads // n_kv)
            scores = np.array([qs[t][h] @ ks[s][kv] / math.sqrt(width) for s in seen])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            heads.append(sum(w * vs[s][kv] for w, s in zip(weights, seen, strict=True)))
        y = np.concatenate(heads)
        if f"{prefix}.gate_proj.weight" in p:
            y = y * sigmoid(p[f"{prefix}.gate_proj.weight"] @ x)
        ys.append(p[f"{prefix}.o_proj.weight"] @ y)
    return ys
