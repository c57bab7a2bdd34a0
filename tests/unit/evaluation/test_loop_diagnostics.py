"""Exit losses and first-token attention of each loop against hidden states, queries and keys that hooks collect."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lt2titan.data.packing import BatchLayout, Piece
from lt2titan.evaluation import loop_diagnostics
from lt2titan.evaluation.loop_diagnostics import validation_diagnostics
from lt2titan.evaluation.validate import evaluate
from lt2titan.model.config import HybridConfig, LoopConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, GDNConfig, MixersConfig, WindowConfig

CPU = torch.device("cpu")
LENGTH = 12


def build(mixer: str, rare: str = "", **changes: Any) -> LT2:
    config = ModelConfig(
        vocab_size=19,
        dim=16,
        n_layers=4,
        n_loops=3,
        ffn_dim=24,
        mixer=mixer,
        hybrid=HybridConfig(mixer=rare, ratio=1),
        mixers=MixersConfig(
            full=FullConfig(n_heads=4, n_kv_heads=2), window=WindowConfig(n_heads=4, window=5), gdn=GDNConfig(n_heads=2)
        ),
        **changes,
    )
    config.validate()
    model = build_on_meta(config, "reference")
    materialise(model, CPU, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "core.rho" or "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double()


MODELS: dict[str, dict[str, Any]] = {
    "full": {"mixer": "full"},
    "window": {"mixer": "window"},
    "gdn": {"mixer": "gdn"},
    "gdn+full, untied": {"mixer": "gdn", "rare": "full", "tie_embeddings": False},
    "window+full, window per loop": {"mixer": "window", "rare": "full", "loop": LoopConfig(windows=[-1, 6, 1])},
}


def text(document_mask: bool) -> list[Any]:
    """Two batches of two rows; the last row is padding but for its start."""
    generator = torch.Generator().manual_seed(1)

    def piece(length: int) -> Piece:
        return Piece(torch.randint(0, 19, (length,), generator=generator).numpy(), True, 1.0)

    rows = [[piece(13)], [piece(4), piece(1), piece(8)], [piece(6), piece(7)], [piece(5)]]
    layout = BatchLayout(seq_len=LENGTH, document_mask=document_mask, max_documents_per_sample=4)
    return [layout.assemble(rows[:2]), layout.assemble(rows[2:])]


def rotate(x: Tensor, position: int) -> Tensor:
    """Each pair (i, i + D/2) of a head (D,) as a complex number, turned by its angle."""
    half = len(x) // 2
    angles = position * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half, dtype=torch.float64), angles)
    return torch.cat([turned.real, turned.imag])


def expected_figures(model: LT2, batches: list[Any], document_mask: bool) -> dict[str, float]:
    """All of it a second time: one query, one row, one loop at a time."""
    n_loops = model.config.n_loops
    nats, mass, n_tokens, n_queries = [0.0] * n_loops, [0.0] * n_loops, 0, [0] * n_loops
    for batch in batches:
        rows = batch.tokens.shape[0]
        is_valid = batch.targets != -100
        n_tokens += int(is_valid.sum())
        outputs: list[Tensor] = []
        projections: dict[tuple[int, str], list[Tensor]] = {}
        hooks = [model.core.blocks[-1].register_forward_hook(lambda _m, _i, out, to=outputs: to.append(out[0]))]
        for layer, kind in enumerate(model.config.layer_mixers):
            for name in ("q", "k") if kind != "gdn" else ():
                to = projections.setdefault((layer, name), [])
                module = getattr(model.core.blocks[layer].mixer, f"{name}_proj")
                hooks.append(module.register_forward_hook(lambda _m, _i, out, to=to: to.append(out)))
        names = ["tokens", "positions", "cu_seqlens"] if document_mask else ["tokens"]
        with torch.no_grad():
            model(**{name: getattr(batch, name) for name in names})
        for hook in hooks:
            hook.remove()
        h = model.embedding.weight[batch.tokens]
        for loop in range(n_loops):
            h = outputs[loop].view_as(h) + (0 if model.core.rho is None else model.core.rho[loop] * h)
            normed = h / (h.square().mean(-1, keepdim=True) + model.norm.eps).sqrt() * model.norm.weight
            logp = (normed @ model.head_weight.T).log_softmax(-1)
            nats[loop] -= sum(logp[r, i, batch.targets[r, i]].item() for r, i in is_valid.nonzero().tolist())
            for layer, kind in enumerate(model.config.layer_mixers):
                if kind == "gdn":
                    continue
                q = projections[layer, "q"][loop].view(rows, LENGTH, 4, 4)
                k = projections[layer, "k"][loop].view(rows, LENGTH, -1, 4)
                window = {"full": 0, "window": 5}[kind]
                if model.config.loop.windows:
                    window = max(model.config.loop.windows[loop], 0)
                for r, i in is_valid.nonzero().tolist():
                    # With a document mask, positions count from the document's first token.
                    first = i - int(batch.positions[r, i])
                    if i == first or (window and i - first >= window):
                        continue
                    keys = range(first, i + 1)
                    for head in range(4):
                        group = head * k.shape[2] // 4
                        query = rotate(q[r, i, head], i - first)
                        scores = torch.stack([query @ rotate(k[r, j, group], j - first) for j in keys]) / math.sqrt(4)
                        mass[loop] += scores.softmax(0)[0].item()
                        n_queries[loop] += 1
    figures = {f"exit_loss/loop_{t + 1}": nats[t] / n_tokens for t in range(n_loops)}
    return figures | {f"first_token_mass/loop_{t + 1}": mass[t] / n_queries[t] for t in range(n_loops) if n_queries[t]}


@pytest.mark.parametrize("document_mask", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("kind", MODELS)
def test_figures_equal_those_worked_out_one_by_one(kind: str, document_mask: bool) -> None:
    model, batches = build(**MODELS[kind]), text(document_mask)
    figures = validation_diagnostics(model, batches, CPU)
    assert figures == pytest.approx(expected_figures(model, batches, document_mask), abs=1e-6)
    assert figures["exit_loss/loop_3"] == evaluate(model, batches, CPU).loss
    # Only softmax layers have it, and only where a query other than the first token sees that.
    with_mass = {"gdn": 0, "window+full, window per loop": 2}.get(kind, 3)
    assert sum(name.startswith("first_token_mass") for name in figures) == with_mass


def test_long_rows_are_looked_at_in_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third query of each row: the mean over these, whether rows come apart or packed as one."""
    monkeypatch.setattr(loop_diagnostics, "QUERIES_PER_ROW", 4)
    model = build("full")
    (batch, _) = text(document_mask=True)
    places = torch.zeros_like(batch.targets, dtype=torch.bool)
    places[:, ::3] = True
    sparse = batch._replace(targets=batch.targets.where(places, -100))
    expected = expected_figures(model, [sparse], document_mask=True)
    figures = validation_diagnostics(model, [batch], CPU)
    for loop in (1, 2, 3):
        name = f"first_token_mass/loop_{loop}"
        assert figures[name] == pytest.approx(expected[name], abs=1e-6)


def test_looking_changes_nothing_and_needs_no_gradient() -> None:
    model, batches = build("gdn", "full"), text(document_mask=False)
    before = evaluate(model, batches, CPU)
    figures = validation_diagnostics(model, batches, CPU)
    assert validation_diagnostics(model, batches, CPU) == figures
    assert evaluate(model, batches, CPU) == before
    assert model.core.observer is None and all(p.grad is None for p in model.parameters())
