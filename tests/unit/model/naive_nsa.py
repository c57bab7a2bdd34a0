"""Native sparse attention for one document, one query and head at a time."""

from __future__ import annotations

import math

import numpy as np
from naive_math import Array, rotate, sigmoid

from lt2titan.model.config import ModelConfig


def softmax(scores: list[float]) -> Array:
    weights = np.exp(np.array(scores) - max(scores))
    return weights / weights.sum()


def nsa(p: dict[str, Array], xs: list[Array], config: ModelConfig, carry: dict) -> list[Array]:
    own = config.mixers.nsa
    n_heads, n_kv, size = own.n_heads, own.n_kv_heads or own.n_heads, own.block_size
    width, theta = len(xs[0]) // n_heads, config.rope_theta

    def heads(name: str, x: Array, n: int) -> list[Array]:
        y = p[f"{name}_proj.weight"] @ x
        return [y[h * width : (h + 1) * width] for h in range(n)]

    ks = [[rotate(k, t, theta) for k in heads("k", x, n_kv)] for t, x in enumerate(xs)]
    vs = [heads("v", x, n_kv) for x in xs]
    outputs = []
    for t, x in enumerate(xs):
        qs = [rotate(q, t, theta) / math.sqrt(width) for q in heads("q", x, n_heads)]
        gates = sigmoid(p["gate_proj.weight"] @ x)
        past = range((t + 1) // size)  # blocks of which the query itself may be the last token
        y: list[Array] = []
        for kv in range(n_kv):
            group = range(kv * n_heads // n_kv, (kv + 1) * n_heads // n_kv)
            means = [np.mean([ks[s][kv] for s in range(c * size, (c + 1) * size)], axis=0) for c in past]
            v_means = [np.mean([vs[s][kv] for s in range(c * size, (c + 1) * size)], axis=0) for c in past]
            weights = {h: softmax([qs[h] @ mean for mean in means]) if past else [] for h in group}
            score = {c: float("inf") for c in (0, t // size, t // size - 1) if c >= 0}
            score |= {c: sum(weights[h][c] for h in group) for c in past if c not in score}
            blocks = sorted(score, key=lambda c: (-score[c], c))[: own.n_blocks]
            selected = [s for c in blocks for s in range(c * size, min((c + 1) * size, t + 1))]
            near = list(range(max(t - own.window + 1, 0), t + 1))
            for h in group:
                branches = [sum((w * v for w, v in zip(weights[h], v_means, strict=True)), start=np.zeros(width))]
                for seen in (selected, near):
                    attention = softmax([qs[h] @ ks[s][kv] for s in seen])
                    branches.append(sum(w * vs[s][kv] for w, s in zip(attention, seen, strict=True)))
                y.append(sum(gate * branch for gate, branch in zip(gates[3 * h : 3 * h + 3], branches, strict=True)))
        outputs.append(p["o_proj.weight"] @ np.concatenate(y))
    return outputs
