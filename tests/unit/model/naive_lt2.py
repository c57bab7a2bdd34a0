"""LT2 written a second time, in numpy and token by token, as the truth for the real one.

Follows the paper's equations (arXiv 2605.20670) directly: no batching, no chunks, no caches, fp64.
"""

from __future__ import annotations

import math

import numpy as np

from lt2titan.model.config import ModelConfig

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean() + eps) * weight


def rotate(x: Array, position: int, theta: float) -> Array:
    """Turn each pair (i, i + D/2) as a complex number."""
    half = len(x) // 2
    angle = position * theta ** (-np.arange(half) / half)
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag])


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


def gdn(
    p: dict[str, Array], prefix: str, xs: list[Array], n_heads: int, n_v: int, beta_max: float, eps: float
) -> list[Array]:
    def convolved(name: str) -> list[Array]:
        taps = p[f"{prefix}.{name}_conv"]
        inputs = [np.zeros(len(taps))] * (taps.shape[1] - 1) + [p[f"{prefix}.{name}_proj.weight"] @ x for x in xs]
        return [silu(sum(taps[:, j] * inputs[t + j] for j in range(taps.shape[1]))) for t in range(len(xs))]

    def unit(x: Array) -> Array:
        return x / np.sqrt((x**2).sum() + 1e-6)

    qs, ks, vs = convolved("q"), convolved("k"), convolved("v")
    dk, dv = len(qs[0]) // n_heads, len(vs[0]) // n_v
    states = [np.zeros((dk, dv)) for _ in range(n_v)]
    ys = []
    for t, x in enumerate(xs):
        a, b = p[f"{prefix}.a_proj.weight"] @ x, p[f"{prefix}.b_proj.weight"] @ x
        gate = p[f"{prefix}.gate_proj.weight"] @ x
        heads = []
        for h in range(n_v):
            key_head = h // (n_v // n_heads)
            q = unit(qs[t][key_head * dk : (key_head + 1) * dk]) / math.sqrt(dk)
            k = unit(ks[t][key_head * dk : (key_head + 1) * dk])
            v = vs[t][h * dv : (h + 1) * dv]
            alpha = np.exp(-np.exp(p[f"{prefix}.A_log"][h]) * np.log1p(np.exp(a[h] + p[f"{prefix}.dt_bias"][h])))
            beta = beta_max * sigmoid(b[h])
            transition = alpha * (np.eye(dk) - beta * np.outer(k, k))
            states[h] = transition @ states[h] + beta * np.outer(k, v)
            o = rms_norm(states[h].T @ q, p[f"{prefix}.o_norm"], eps)
            heads.append(o * silu(gate[h * dv : (h + 1) * dv]))
        ys.append(p[f"{prefix}.o_proj.weight"] @ np.concatenate(heads))
    return ys


def logits(p: dict[str, Array], config: ModelConfig, tokens: list[int]) -> Array:
    """(L, vocab) for one document."""
    m, eps = config.mixers, config.norm_eps
    hs = [p["embedding.weight"][token] for token in tokens]
    for loop in range(config.n_loops):
        before = hs
        for i, kind in enumerate(config.layer_mixers):
            block = f"core.blocks.{i}"
            xs = [rms_norm(h, p[f"{block}.mixer_norm.weight"], eps) for h in hs]
            if kind == "gdn":
                heads, v_heads = m.gdn.n_heads, m.gdn.n_v_heads or m.gdn.n_heads
                ys = gdn(p, f"{block}.mixer", xs, heads, v_heads, 2.0 if m.gdn.allow_neg_eigval else 1.0, eps)
            else:
                own = m.full if kind == "full" else m.window
                window = m.window.window if kind == "window" else 0
                if config.loop.windows:
                    window = max(config.loop.windows[loop], 0)
                kv = own.n_kv_heads or own.n_heads
                ys = softmax_attention(p, f"{block}.mixer", xs, own.n_heads, kv, window, config.rope_theta)
            hs = [h + y for h, y in zip(hs, ys, strict=True)]
            out = []
            for h in hs:
                x = rms_norm(h, p[f"{block}.ffn_norm.weight"], eps)
                up = silu(p[f"{block}.ffn.gate_proj.weight"] @ x) * (p[f"{block}.ffn.up_proj.weight"] @ x)
                out.append(h + p[f"{block}.ffn.down_proj.weight"] @ up)
            hs = out
        if config.loop.residual_gate:
            hs = [h + p["core.rho"][loop] * b for h, b in zip(hs, before, strict=True)]
    head = p["embedding.weight"] if config.tie_embeddings else p["head.weight"]
    return np.stack([head @ rms_norm(h, p["norm.weight"], eps) for h in hs])
