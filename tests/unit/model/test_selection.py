"""Recall and overlap of selections against their definition, one query at a time; and an indexer that learns."""

from __future__ import annotations

import dsa_truth
import pytest
import torch
from model_zoo import ZOO, build, small
from torch import Tensor

from lt2titan.data.device import model_inputs
from lt2titan.data.packing import Batch
from lt2titan.evaluation.loop_diagnostics import validation_diagnostics
from lt2titan.kernels.dsa import reference
from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.model.block import Block
from lt2titan.model.context import Context
from lt2titan.model.indexer_schedule import IndexerSchedule
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.looped_core import LoopObserver
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import DSAConfig, MixersConfig
from lt2titan.model.mixers.dsa import DSA, INDEXER_KL
from lt2titan.model.selection import selection_figures
from lt2titan.optim.clip import clip_grad_norm

LENGTH = 24
CPU = torch.device("cpu")


class Truth(LoopObserver):
    """Recall and overlap by loop, from L x L tensors."""

    def __init__(self, documents: list[int]) -> None:
        self.seen = dsa_truth.seen_mask(sum(documents), documents)
        self.before: dict[DSA, Tensor] = {}
        self.values: list[dict[str, list[float]]] = [{"recall": [], "overlap": []}]

    def after_block(self, block: Block, x: Tensor, context: Context) -> None:
        mixer = block.mixer
        if not isinstance(mixer, DSA):
            return
        x = block.mixer_norm(x)
        q, k, v = mixer.heads(x, context)
        options = {"forced_first": mixer.forced_first, "forced_local": mixer.forced_local}
        if context.reuses_selection:
            mask = self.before[mixer]
        else:
            mask = dsa_truth.chosen(dsa_truth.scores(*mixer.index(x, context)), self.seen, mixer.top_k, **options)
        p = dsa_truth.attention(q, k, v, self.seen.expand(x.shape[0], -1, -1))[1].mean(1)
        for row in range(x.shape[0]):
            for t in range(x.shape[1]):
                if self.seen[t].sum() <= mixer.top_k:
                    continue
                best = sorted(p[row, t].tolist())[-mixer.top_k :]
                self.values[-1]["recall"].append(float(p[row, t][mask[row, t]].sum()) / sum(best))
                if mixer in self.before:
                    shared = (mask[row, t] & self.before[mixer][row, t]).sum()
                    self.values[-1]["overlap"].append(int(shared) / mixer.top_k)
        self.before[mixer] = mask

    def after_loop(self, *_: object) -> None:
        self.values.append({"recall": [], "overlap": []})


@pytest.mark.parametrize("kind", ["dsa", "gdn+dsa, forced tokens, reuse"])
@pytest.mark.parametrize("document_mask", [False, True])
def test_figures_of_every_loop(kind: str, document_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "NUMBERS", 1 << 9)  # several blocks of queries
    model = build(ZOO[kind])
    tokens = torch.randint(0, 19, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    documents = [7, LENGTH - 7, LENGTH] if document_mask else [LENGTH]
    ends = torch.tensor([0, *documents]).cumsum(0).int() if document_mask else None
    positions = torch.cat([torch.arange(n) for n in documents * (1 if document_mask else 2)]).view(2, LENGTH)
    chunks = None if ends is None else make_chunk_indices(ends)
    batch = Batch(tokens, tokens, positions, ends, torch.tensor(1.0), chunks)
    figures = validation_diagnostics(model, [batch], CPU)
    truth = Truth(documents)
    with torch.no_grad(), model.core.observed_by(truth):
        model(**{**model_inputs(batch, CPU), "targets": None})
    for loop, values in enumerate(truth.values[:3], start=1):
        assert figures[f"selection_recall/loop_{loop}"] == pytest.approx(sum(values["recall"]) / len(values["recall"]))
        if loop == 1:
            assert "selection_overlap/loop_1" not in figures
        else:
            mean = sum(values["overlap"]) / len(values["overlap"])
            assert figures[f"selection_overlap/loop_{loop}"] == pytest.approx(mean)
    if "reuse" in kind:
        assert figures["selection_overlap/loop_2"] == 1 > figures["selection_overlap/loop_3"]


# A needle in a haystack: one of N_NEEDLES tokens among noise, to be named wherever the sequence asks.
N_NOISE, N_NEEDLES = 16, 16
QUESTION = N_NOISE + N_NEEDLES
HAYSTACK, TOP_K = 64, 6
N_WARMUP, N_STEPS = 120, 180


def haystacks(generator: torch.Generator, n_rows: int = 16) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, L): noise, the needle somewhere in the first half, questions in the second."""
    tokens = torch.randint(0, N_NOISE, (n_rows, HAYSTACK), generator=generator)
    needle = torch.randint(N_NOISE, QUESTION, (n_rows, 1), generator=generator)
    tokens.scatter_(1, torch.randint(0, HAYSTACK // 2, (n_rows, 1), generator=generator), needle)
    asks = torch.zeros(n_rows, HAYSTACK, dtype=torch.bool)
    asks[:, HAYSTACK // 2 :] = torch.rand(n_rows, HAYSTACK // 2, generator=generator) < 0.2
    tokens[asks] = QUESTION
    return tokens, torch.where(asks, needle, -100)


def learn(kl_weight: float) -> LT2:
    sizes = {"n_heads": 4, "top_k": TOP_K, "n_index_heads": 4, "index_head_dim": 16}
    mixers = MixersConfig(dsa=DSAConfig(**sizes, warmup_steps=N_WARMUP, kl_weight=kl_weight))
    config = small("dsa", vocab_size=QUESTION + 1, dim=64, n_layers=1, n_loops=1, ffn_dim=64, mixers=mixers)
    model, schedule = build_on_meta(config, "reference"), IndexerSchedule(config)
    materialise(model, CPU, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, N_STEPS + 1):
        tokens, targets = haystacks(generator)
        loss, auxiliary = model(tokens, targets=targets, sees_all=schedule.sees_all(step), with_auxiliary=True)
        loss = loss / (targets >= 0).sum() + schedule.objective(auxiliary[INDEXER_KL], tokens.numel())
        loss.backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def examine(model: LT2) -> tuple[float, float]:
    """Of new haystacks: nats per answer, and recall of the attention mass where the model is asked."""
    tokens, targets = haystacks(torch.Generator().manual_seed(1), 64)
    loss = model(tokens, targets=targets) / (targets >= 0).sum()
    recall = Recall(targets >= 0)
    with model.core.observed_by(recall):
        model(tokens)
    return float(loss), float(recall.sums[0] / recall.sums[1])


class Recall(LoopObserver):
    def __init__(self, counted: Tensor) -> None:
        self.counted, self.sums = counted, torch.zeros(4, dtype=torch.float64)

    def after_block(self, block: Block, x: Tensor, context: Context) -> None:
        assert isinstance(block.mixer, DSA)
        queries = torch.arange(x.shape[1])
        self.sums += selection_figures(block.mixer, block.mixer_norm(x), context, queries, self.counted, None)[0]


def test_an_indexer_learns_to_find_what_attention_looks_for() -> None:
    """From chance to more than 0.9 of the attention mass; without its loss it stays at chance, 6 of 32 to 64 keys, and
    the model that attends to its choice has no answer, though it had learned one while it saw everything."""
    (loss, recall), (loss_random, chance) = examine(learn(kl_weight=1.0)), examine(learn(kl_weight=0.0))
    print(f"recall {chance:.3f} -> {recall:.3f}; loss with a random indexer {loss_random:.3f}, trained {loss:.3f}")
    assert chance < 0.4 and recall > 0.9
    assert loss < 0.2 and loss_random > loss + 0.5
