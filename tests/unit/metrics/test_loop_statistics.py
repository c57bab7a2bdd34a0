"""Per-loop statistics of the residual stream against hidden states that hooks collect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lt2titan.metrics.loop_statistics import LoopStatistics
from lt2titan.model.config import HybridConfig, LoopConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.looped_core import LoopObserver
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import FullConfig, GDNConfig, MixersConfig
from lt2titan.model.recompute import RecomputePlan

CPU = torch.device("cpu")


def build(n_loops: int = 3, is_gated: bool = True) -> LT2:
    """In fp64, with rho away from zero."""
    config = ModelConfig(
        vocab_size=19,
        dim=16,
        n_layers=3,
        n_loops=n_loops,
        ffn_dim=24,
        mixer="gdn",
        hybrid=HybridConfig(mixer="full", ratio=2),
        loop=LoopConfig(residual_gate=is_gated),
        mixers=MixersConfig(full=FullConfig(n_heads=4), gdn=GDNConfig(n_heads=2)),
    )
    model = build_on_meta(config, "reference")
    materialise(model, CPU, seed=0)
    if model.core.rho is not None:
        torch.nn.init.normal_(model.core.rho, std=0.3, generator=torch.Generator().manual_seed(0))
    return model.double()


def batches() -> list[Tensor]:
    """Microbatches of unequal size: means of means would be wrong."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 19, (rows, 12), generator=generator) for rows in (1, 3)]


def loss(model: LT2, tokens: Tensor) -> Tensor:
    return model(tokens[:, :-1], targets=tokens[:, 1:])


def hidden_states(model: LT2, tokens: Tensor) -> list[Tensor]:
    """h(0) .. h(T), from what the last block returns: the residual gate is applied here once more."""
    stack_outputs: list[Tensor] = []
    hook = model.core.blocks[-1].register_forward_hook(lambda _m, _i, out: stack_outputs.append(out[0]))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    states = [model.embedding.weight[tokens]]
    for loop, h in enumerate(stack_outputs):
        states.append(h if model.core.rho is None else h + model.core.rho[loop] * states[-1])
    return [h.detach() for h in states]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("n_loops", [1, 3])
def test_figures_are_those_of_all_tokens_of_all_microbatches(n_loops: int, is_gated: bool, recompute: bool) -> None:
    model = build(n_loops, is_gated)
    model.core.recompute = RecomputePlan(blocks=recompute)
    statistics = LoopStatistics(n_loops, CPU)
    for tokens in batches():
        with model.core.observed_by(statistics):
            loss(model, tokens).backward()  # recomputes blocks while the observer still looks
    figures = statistics.figures()

    states = [hidden_states(model, tokens[:, :-1]) for tokens in batches()]
    h = [torch.cat([batch[t].flatten(0, 1) for batch in states]) for t in range(n_loops + 1)]
    expected = {}
    for t in range(1, n_loops + 1):
        expected[f"residual_rms/loop_{t}"] = h[t].square().mean().sqrt().item()
        expected[f"relative_update/loop_{t}"] = ((h[t] - h[t - 1]).norm() / h[t - 1].norm()).item()
        if model.core.rho is not None:
            expected[f"rho/loop_{t}"] = model.core.rho[t - 1].abs().mean().item()
    assert figures == pytest.approx(expected, rel=1e-12)


def test_loops_that_do_not_run_are_left_out() -> None:
    model = build(n_loops=3)
    statistics = LoopStatistics(3, CPU)
    with model.core.observed_by(statistics):
        model(batches()[0], n_loops=2, n_backward_loops=1)
    fewer = statistics.figures()
    statistics = LoopStatistics(3, CPU)
    with model.core.observed_by(statistics):
        model(batches()[0])
    assert fewer == {name: value for name, value in statistics.figures().items() if not name.endswith("loop_3")}
    assert len(fewer) == 6


def test_being_observed_changes_nothing() -> None:
    one, other = build(), build()
    tokens = batches()[1]
    with one.core.observed_by(LoopStatistics(one.config.n_loops, CPU)):
        value = loss(one, tokens)
    value.backward()
    expected = loss(other, tokens)
    expected.backward()
    assert torch.equal(value, expected)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_the_observer_goes_even_after_an_error() -> None:
    class Broken(LoopObserver):
        def after_loop(self, *_: object) -> None:
            raise RuntimeError("broken observer")

    model = build()
    with pytest.raises(RuntimeError, match="broken observer"), model.core.observed_by(Broken()):
        model(batches()[0])
    assert model.core.observer is None
    model(batches()[0])


def test_nothing_waits_for_the_device() -> None:
    """Tensors on meta have no values: asking for one raises."""
    meta = torch.device("meta")
    statistics = LoopStatistics(2, meta)
    h = torch.empty(2, 3, 4, device=meta, dtype=torch.bfloat16)
    for loop in (0, 1):
        statistics.after_loop(loop, h, h + 1, torch.empty(4, device=meta))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        statistics.figures()


def test_what_is_not_finite_or_not_there_is_nan() -> None:
    statistics = LoopStatistics(2, CPU)
    zero, poisoned = torch.zeros(1, 2, 3), torch.full((1, 2, 3), torch.nan)
    statistics.after_loop(0, zero, zero, None)
    statistics.after_loop(1, zero, poisoned, None)
    figures = statistics.figures()
    assert figures["residual_rms/loop_1"] == 0.0
    assert all(figures[name] != figures[name] for name in ("relative_update/loop_1", "residual_rms/loop_2"))
    assert not any(name.startswith("rho") for name in figures)


def test_large_bf16_states_are_summed_exactly_enough() -> None:
    """A running fp32 (or bf16) sum over 4 million ones would stop growing or drift."""
    statistics = LoopStatistics(1, CPU)
    h = torch.full((4, 1024, 1024), 1.5, dtype=torch.bfloat16)
    statistics.after_loop(0, h, 2 * h, None)
    assert statistics.figures() == {"residual_rms/loop_1": 3.0, "relative_update/loop_1": 1.0}
