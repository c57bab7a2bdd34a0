"""Which parameters decay, and steps that must not be taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.mixers.config import GDNConfig, MixersConfig
from lt2titan.optim.config import OptimizerConfig
from lt2titan.optim.guard import NonFiniteError, NonFiniteGuard
from lt2titan.optim.optimizer import build_optimizer

CPU = torch.device("cpu")
UNDECAYED = ("norm", "rho", "A_log", "dt_bias", "embedding")


def test_only_matrices_decay() -> None:
    """Without a gradient AdamW only decays: what shrinks is what decays."""
    config = ModelConfig(
        dim=32,
        n_layers=5,
        ffn_multiple_of=32,
        tie_embeddings=False,
        hybrid=HybridConfig(mixer="full"),
        mixers=MixersConfig(gdn=GDNConfig(n_heads=4)),
    )
    model = build_on_meta(config, "reference")
    materialise(model, CPU, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
            parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if any(word in name for word in UNDECAYED) else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


class Problem:
    """A parameter, its fused AdamW and a guard."""

    def __init__(self) -> None:
        self.parameter = nn.Parameter(torch.ones(3))
        self.optimizer = torch.optim.AdamW([self.parameter], lr=0.1, fused=True)
        self.guard = NonFiniteGuard(max_in_a_row=2, device=CPU)

    def step(self, gradient: float, loss: float = 1.0) -> None:
        self.parameter.grad = torch.full((3,), gradient)
        self.guard.step(self.optimizer, torch.tensor(loss), self.parameter.grad.norm())
        self.guard.check()


@pytest.mark.parametrize(
    "bad", [{"gradient": float("nan")}, {"gradient": float("inf")}, {"gradient": 1.0, "loss": float("nan")}]
)
def test_poisoned_steps_leave_no_trace(bad: dict[str, float]) -> None:
    clean, poisoned = Problem(), Problem()
    for gradient in (0.3, -0.7, 0.1):
        clean.step(gradient)
        poisoned.step(gradient)
        poisoned.step(**bad)
    assert torch.equal(clean.parameter, poisoned.parameter)
    for key, value in clean.optimizer.state[clean.parameter].items():
        assert torch.equal(value, poisoned.optimizer.state[poisoned.parameter][key]), key
    assert (clean.guard.counts(), poisoned.guard.counts()) == ((0, 0), (3, 1))


def test_too_many_in_a_row_stop_the_run_a_few_steps_later_whatever_is_logged() -> None:
    problem = Problem()
    for gradient in (float("nan"), 1.0, float("nan"), 1.0, 1.0, float("nan")):
        problem.step(gradient)  # never two in a row
    problem.step(float("nan"))
    problem.step(1.0)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row.*optimizer\.lr"):
        problem.step(1.0)


def test_the_end_of_a_run_looks_at_its_last_steps() -> None:
    problem = Problem()
    problem.step(float("nan"))
    problem.step(float("nan"))
    with pytest.raises(NonFiniteError):
        problem.guard.check(last=True)


def test_counts_continue_from_a_checkpoint() -> None:
    problem = Problem()
    problem.guard.restore(4, 1)
    problem.step(float("nan"))
    assert problem.guard.counts() == (5, 2)
    with pytest.raises(NonFiniteError):
        problem.guard.check(last=True)
