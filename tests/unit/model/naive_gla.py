"""Gated linear attention and HGRN2 as their papers write them: a state matrix per head, one token at a time."""

from __future__ import annotations

import math

import numpy as np
from naive_math import Array, rms_norm, sigmoid, silu

from lt2titan.model.config import ModelConfig


def gla(p: dict[str, Array], xs: list[Array], config: ModelConfig, carry: dict[str, list[Array]]) -> list[Array]:
    """arXiv 2312.06635, equations 3 and 4 and section 4.4: S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T."""
    own = config.mixers.gla
    dk, dv = (len(p[f"{name}_proj.weight"]) // own.n_heads for name in "qv")
    states = [np.zeros((dk, dv)) for _ in range(own.n_heads)]
    ys = []
    for x in xs:
        q, k, v, gate = (p[f"{name}_proj.weight"] @ x for name in ("q", "k", "v", "gate"))
        logits = p["a_up_proj.weight"] @ (p["a_down_proj.weight"] @ x) + p["a_bias"]
        alpha = sigmoid(logits) ** (1 / own.decay_temperature)
        heads = []
        for h in range(own.n_heads):
            keys, values = slice(h * dk, (h + 1) * dk), slice(h * dv, (h + 1) * dv)
            states[h] = np.diag(alpha[keys]) @ states[h] + np.outer(k[keys], v[values])
            o = states[h].T @ q[keys] / math.sqrt(dk)
            heads.append(rms_norm(o, p["o_norm"], config.norm_eps) * silu(gate[values]))
        ys.append(p["o_proj.weight"] @ np.concatenate(heads))
    return ys


def hgrn2(p: dict[str, Array], xs: list[Array], config: ModelConfig, carry: dict[str, list[Array]]) -> list[Array]:
    """arXiv 2404.07904, equation 6 with many heads: h_t = Diag(f_t) h_{t-1} + (1 - f_t) i_t^T."""
    n_heads = config.mixers.hgrn2.n_heads
    width = config.dim // n_heads
    states = [np.zeros((width, width)) for _ in range(n_heads)]
    ys = []
    for x in xs:
        q, f, i = silu(p["q_proj.weight"] @ x), sigmoid(p["f_proj.weight"] @ x), p["i_proj.weight"] @ x
        heads = []
        for h in range(n_heads):
            own = slice(h * width, (h + 1) * width)
            states[h] = np.diag(f[own]) @ states[h] + np.outer(1 - f[own], i[own])
            heads.append(states[h].T @ q[own] / math.sqrt(width))
        ys.append(p["o_proj.weight"] @ rms_norm(np.concatenate(heads), p["o_norm"], config.norm_eps))
    return ys
