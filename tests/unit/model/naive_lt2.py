"""LT2 written a second time, in numpy and token by token, as the truth for the real one.

Follows the paper's equations (arXiv 2605.20670) directly: no batching, no chunks, no caches, fp64.
"""

from __future__ import annotations

import numpy as np
from naive_attention import softmax_attention
from naive_deltanet import deltanet
from naive_dsa import dsa
from naive_gdn import gdn
from naive_gla import gla, hgrn2
from naive_kda import kda
from naive_mamba2 import mamba2
from naive_math import Array, rms_norm, silu
from naive_nsa import nsa
from naive_retnet import retnet
from naive_rwkv7 import rwkv7

from lt2titan.model.config import ModelConfig

MIXERS = {
    "retnet": retnet,
    "mamba2": mamba2,
    "gla": gla,
    "hgrn2": hgrn2,
    "deltanet": deltanet,
    "gdn": gdn,
    "kda": kda,
    "rwkv7": rwkv7,
    "nsa": nsa,
}
"""(the mixer's parameters, inputs, config, what layers of one loop share) -> outputs, for all but softmax attention."""


def logits(p: dict[str, Array], config: ModelConfig, tokens: list[int]) -> Array:
    """(L, vocab) for one document."""
    m, eps = config.mixers, config.norm_eps
    hs = [p["embedding.weight"][token] for token in tokens]
    chosen: dict[int, list[list[int]]] = {}  # by DSA layer, through the loops
    for loop in range(config.n_loops):
        before, carry = hs, {}
        may_choose = loop % m.dsa.reuse_every == 0
        for i, kind in enumerate(config.layer_mixers):
            block = f"core.blocks.{i}"
            xs = [rms_norm(h, p[f"{block}.mixer_norm.weight"], eps) for h in hs]
            if kind in MIXERS:
                own_parameters = {n.removeprefix(f"{block}.mixer."): v for n, v in p.items() if f"{block}.mixer." in n}
                ys = MIXERS[kind](own_parameters, xs, config, carry)
            elif kind == "dsa":
                own_parameters = {n.removeprefix(f"{block}.mixer."): v for n, v in p.items() if f"{block}.mixer." in n}
                ys, chosen[i] = dsa(own_parameters, xs, config, None if may_choose else chosen[i])
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
