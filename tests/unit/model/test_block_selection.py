"""Recall and overlap of NSA's blocks against their definition, one query and head at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_zoo import ZOO, build
from naive_nsa import softmax
from torch import Tensor

from lt2titan.data.device import model_inputs
from lt2titan.data.packing import Batch
from lt2titan.evaluation.loop_diagnostics import validation_diagnostics
from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.model import attention_mass
from lt2titan.model.block import Block
from lt2titan.model.context import Context
from lt2titan.model.looped_core import LoopObserver
from lt2titan.model.mixers.config import NSAConfig
from lt2titan.model.mixers.nsa import NSA

LENGTH, N_ROWS = 24, 2
CPU = torch.device("cpu")
Choice = dict[tuple[int, int], set[int]]
"""Blocks by query, counted over the rows, and key head."""


class Truth(LoopObserver):
    """Recall and overlap by loop."""

    def __init__(self, documents: list[int]) -> None:
        self.starts = np.cumsum([0, *documents]).tolist()
        self.before: dict[NSA, Choice] = {}
        self.values: list[dict[str, list[float]]] = [{"recall": [], "overlap": []}]

    def after_block(self, block: Block, x: Tensor, context: Context) -> None:
        mixer = block.mixer
        if not isinstance(mixer, NSA):
            return
        q, k, _ = (y.flatten(0, 1).double().numpy() for y in mixer.heads(block.mixer_norm(x), context))
        choice: Choice = {}
        for t in range(len(q)):
            start = max(s for s in self.starts if s <= t)
            recalls, overlaps = [], []
            for kv in range(mixer.n_kv_heads):
                group = range(kv * mixer.n_heads // mixer.n_kv_heads, (kv + 1) * mixer.n_heads // mixer.n_kv_heads)
                chosen = choice[t, kv] = self.choose(mixer, q[t, group], k[start : t + 1, kv])
                # Of full attention, mean over the heads of the group: the mass of each block.
                scores = [q[t, h] @ k[start : t + 1, kv].T / q.shape[-1] ** 0.5 for h in group]
                p = np.mean([softmax(list(s)) for s in scores], axis=0)
                mass = [p[c : c + mixer.block_size].sum() for c in range(0, len(p), mixer.block_size)]
                if len(mass) <= mixer.n_blocks:
                    continue
                assert len(chosen) == mixer.n_blocks
                recalls.append(sum(mass[c] for c in chosen) / sum(sorted(mass)[-mixer.n_blocks :]))
                if mixer in self.before:
                    overlaps.append(len(chosen & self.before[mixer][t, kv]) / mixer.n_blocks)
            self.values[-1]["recall"] += [np.mean(recalls)] if recalls else []
            self.values[-1]["overlap"] += [np.mean(overlaps)] if overlaps else []
        self.before[mixer] = choice

    @staticmethod
    def choose(mixer: NSA, q: np.ndarray, k: np.ndarray) -> set[int]:
        """Of one query's heads q (G, D), the last of the document's tokens so far, whose keys are k (n, D)."""
        size, own = mixer.block_size, (len(k) - 1) // mixer.block_size
        means = [k[c * size : (c + 1) * size].mean(axis=0) for c in range(len(k) // size)]
        weights = [softmax([float(head @ mean) / len(head) ** 0.5 for mean in means]) if means else [] for head in q]
        score = {c: sum(w[c] for w in weights) for c in range(len(means))}
        score |= {c: float("inf") for c in (0, own, own - 1) if c >= 0}
        return set(sorted(score, key=lambda c: (-score[c], c))[: mixer.n_blocks])

    def after_loop(self, *_: object) -> None:
        self.values.append({"recall": [], "overlap": []})


TWO_KEY_HEADS = NSAConfig(n_heads=4, n_kv_heads=2, block_size=3, n_blocks=4, window=5)
KINDS = {
    "one key head": ZOO["nsa"],
    "beside gdn": ZOO["gdn+nsa"],
    "two key heads": replace(ZOO["nsa"], mixers=replace(ZOO["nsa"].mixers, nsa=TWO_KEY_HEADS)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_figures_of_every_loop(kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_mass, "SCORES", 1 << 10)  # several blocks of queries
    model = build(KINDS[kind])
    tokens = torch.randint(0, 19, (N_ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    documents = [7, LENGTH - 7, LENGTH] if packed else [LENGTH] * N_ROWS
    positions = torch.cat([torch.arange(n) for n in documents]).view(N_ROWS, LENGTH)
    ends = torch.tensor([0, *documents]).cumsum(0).int() if packed else None
    chunks = None if ends is None else make_chunk_indices(ends)
    batch = Batch(tokens, tokens, positions, ends, torch.tensor(1.0), chunks)
    figures = validation_diagnostics(model, [batch], CPU)
    truth = Truth(documents)
    with torch.no_grad(), model.core.observed_by(truth):
        model(**{**model_inputs(batch, CPU), "targets": None})
    assert "selection_overlap/loop_1" not in figures
    for loop, values in enumerate(truth.values[:3], start=1):
        for name, of_loop in values.items():
            assert bool(of_loop) == (name == "recall" or loop > 1)
            if of_loop:
                assert 0 < np.mean(of_loop) < 1
                assert figures[f"selection_{name}/loop_{loop}"] == pytest.approx(np.mean(of_loop))
