"""DeepSeek Sparse Attention (arXiv 2512.02556, section 2.1) for one document, one query and one key at a time."""

from __future__ import annotations

import math

import numpy as np
from naive_math import Array, rotate, sigmoid

from lt2titan.model.config import ModelConfig


def dsa(
    p: dict[str, Array], xs: list[Array], config: ModelConfig, chosen: list[list[int]] | None
) -> tuple[list[Array], list[list[int]]]:
    """Outputs, and the keys that each query sees: ``chosen``, or of its own choice."""
    m, theta = config.mixers.dsa, config.rope_theta
    n_kv, width = m.n_kv_heads or m.n_heads, len(xs[0]) // m.n_heads
    if chosen is None:
        chosen = choose(p, xs, config)
    qs, ks, vs = [], [], []
    for t, x in enumerate(xs):
        q, k, v = (p[f"{n}_proj.weight"] @ x for n in "qkv")
        qs.append([rotate(part, t, theta) for part in np.split(q, m.n_heads)])
        ks.append([rotate(part, t, theta) for part in np.split(k, n_kv)])
        vs.append(np.split(v, n_kv))
    ys = []
    for t, x in enumerate(xs):
        heads = []
        for h in range(m.n_heads):
            kv = h * n_kv // m.n_heads
            weights = {s: math.exp(qs[t][h] @ ks[s][kv] / math.sqrt(width)) for s in chosen[t]}
            heads.append(sum(w * vs[s][kv] for s, w in weights.items()) / sum(weights.values()))
        y = np.concatenate(heads)
        if "gate_proj.weight" in p:
            y = y * sigmoid(p["gate_proj.weight"] @ x)
        ys.append(p["o_proj.weight"] @ y)
    return ys, chosen


def choose(p: dict[str, Array], xs: list[Array], config: ModelConfig) -> list[list[int]]:
    """For each token, the places it sees."""
    m, theta = config.mixers.dsa, config.rope_theta
    index_q, index_k, index_w = [], [], []
    for t, x in enumerate(xs):
        q = p["index_q_proj.weight"] @ x
        index_q.append([rotate(part, t, theta) for part in np.split(q, m.n_index_heads)])
        k = p["index_k_proj.weight"] @ x
        k = (k - k.mean()) / math.sqrt(k.var() + config.norm_eps) * p["index_norm"] + p["index_norm_bias"]
        index_k.append(rotate(k, t, theta))
        index_w.append(p["index_w_proj.weight"] @ x / math.sqrt(m.n_index_heads) / math.sqrt(m.index_head_dim))
    chosen = []
    for t in range(len(xs)):
        scores = []
        for s in range(t + 1):
            score = sum(w * max(q @ index_k[s], 0.0) for w, q in zip(index_w[t], index_q[t], strict=True))
            is_forced = s > t - m.forced_local or (m.forced_first and s == 0)
            scores.append((not is_forced, -score, s))  # sorted: forced, then the greatest score, then the earliest
        chosen.append(sorted(s for _, _, s in sorted(scores)[: m.top_k]))
    return chosen
