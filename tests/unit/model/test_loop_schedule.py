"""How many loops each step runs: distributions against their definitions, and what must never differ."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from model_zoo import ZOO, build
from torch.utils.flop_counter import FlopCounterMode

from lt2titan.config.section import ConfigError
from lt2titan.model.config import LoopConfig, ModelConfig
from lt2titan.model.flops import scheduled_flops_per_token, training_flops_per_token
from lt2titan.model.init import build_on_meta
from lt2titan.model.loop_schedule import LoopSchedule, poisson_lognormal
from lt2titan.model.mixers.config import FullConfig, MixersConfig

UNIFORM = LoopConfig(schedule="uniform", min_loops=2)
POISSON = LoopConfig(schedule="poisson_lognormal", mean_loops=4.0, min_loops=2)
LIST = LoopConfig(schedule="list", loops=[1, 4, 4, 6])
GROW = LoopConfig(schedule="grow", min_loops=2, grow_steps=10)


def observed(config: LoopConfig, n_steps: int, seed: int = 0, n_loops: int = 6) -> list[int]:
    schedule = LoopSchedule(config, n_loops, seed)
    return [schedule.loops(step) for step in range(1, n_steps + 1)]


def poisson_lognormal_by_drawing(mean_loops: float, sigma: float, low: int, high: int) -> dict[int, float]:
    """Huginn's recipe as it is written down: draw tau, draw a Poisson number, add one; reject what is cut off."""
    rng = np.random.default_rng(0)
    tau = rng.normal(np.log(mean_loops - 1) - sigma**2 / 2, sigma, size=2_000_000)
    loops = rng.poisson(np.exp(tau)) + 1
    kept = loops[(loops >= low) & (loops <= high)]
    return {n: float((kept == n).mean()) for n in range(low, high + 1)}


@pytest.mark.parametrize(
    ("config", "probabilities"),
    [
        pytest.param(UNIFORM, dict.fromkeys(range(2, 7), 0.2), id="uniform"),
        pytest.param(LIST, {1: 0.25, 4: 0.5, 6: 0.25}, id="list"),
        pytest.param(POISSON, poisson_lognormal_by_drawing(4.0, 0.5, 2, 6), id="poisson_lognormal"),
        pytest.param(LoopConfig(), {6: 1.0}, id="fixed"),
    ],
)
def test_steps_follow_the_distribution(config: LoopConfig, probabilities: dict[int, float]) -> None:
    schedule, n_steps = LoopSchedule(config, 6, seed=0), 20_000
    assert schedule.shares(n_steps) == pytest.approx(probabilities, abs=2e-3)
    mean = sum(n * p for n, p in probabilities.items())
    assert schedule.mean(n_steps) == pytest.approx(mean, abs=5e-3)
    counts = Counter(observed(config, n_steps))
    assert counts.keys() == probabilities.keys()
    exact = schedule.shares(n_steps)
    chi_square = sum((counts[n] - p * n_steps) ** 2 / (p * n_steps) for n, p in exact.items())
    assert chi_square < 18.5  # 99.9 % quantile at 4 degrees of freedom, the most there are


@pytest.mark.parametrize(("sigma", "far", "tolerance"), [(0.1, 60, 1e-10), (0.5, 250, 1e-9), (0.8, 500, 1e-5)])
def test_poisson_lognormal_has_the_moments_of_its_definition(sigma: float, far: int, tolerance: float) -> None:
    """Variance: E[rate] + Var[rate] (law of total variance)."""
    mean, k = 3.0, np.arange(far)
    p = np.array([poisson_lognormal(n, mean, sigma) for n in range(far)])
    assert p.sum() == pytest.approx(1, abs=tolerance)
    assert (k * p).sum() == pytest.approx(mean, rel=tolerance)
    assert ((k - mean) ** 2 * p).sum() == pytest.approx(mean + mean**2 * np.expm1(sigma**2), rel=tolerance)


def test_steps_and_seeds_are_independent_of_each_other() -> None:
    """Neighbours in step and in seed: correlations of 20,000 pairs stay within 4 standard deviations of 0."""
    steps, other_seed = np.array(observed(UNIFORM, 20_000)), np.array(observed(UNIFORM, 20_000, seed=1))
    for a, b in ((steps[:-1], steps[1:]), (steps, other_seed)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / 20_000**0.5


@pytest.mark.parametrize("config", [UNIFORM, POISSON, LIST], ids=lambda c: c.schedule)
def test_a_fresh_process_draws_the_same_from_any_step_on(config: LoopConfig) -> None:
    """Nothing but (seed, step): not the steps before, not torch's or Python's generators, not the hash seed."""
    program = (
        "from lt2titan.model.config import LoopConfig\nfrom lt2titan.model.loop_schedule import LoopSchedule\n"
        f"s = LoopSchedule({config!r}, 6, 7)\nprint([s.loops(n) for n in range(50, 100)])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    schedule = LoopSchedule(config, 6, 7)
    torch.manual_seed(1)
    assert [schedule.loops(n) for n in range(1, 100)][49:] == json.loads(output)


def test_a_known_sequence() -> None:
    """The draws are part of the project: a run that goes on with a newer version must go on with the same ones."""
    assert observed(UNIFORM, 12, seed=42) == [2, 5, 4, 6, 5, 3, 4, 2, 6, 6, 4, 3]


def test_growth_in_equal_parts() -> None:
    assert observed(GROW, 13) == [2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6, 6]
    assert observed(replace(GROW, grow_steps=4), 6) == [2, 3, 4, 5, 6, 6]
    assert observed(replace(GROW, grow_steps=2), 4) == [2, 4, 6, 6]
    assert LoopSchedule(GROW, 6, 0).shares(13) == pytest.approx({2: 3 / 13, 3: 2 / 13, 4: 3 / 13, 5: 2 / 13, 6: 3 / 13})
    assert LoopSchedule(GROW, 6, 0).mean(5) == pytest.approx(2.4)


def test_gradients_pass_through_no_more_loops_than_run() -> None:
    schedule = LoopSchedule(replace(UNIFORM, backward_loops=3), 6, 0)
    assert [schedule.backward_loops(n) for n in (2, 3, 6)] == [2, 3, 3]
    assert [LoopSchedule(UNIFORM, 6, 0).backward_loops(n) for n in (2, 6)] == [2, 6]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoopConfig(min_loops=2), r"loop\.min_loops = 2: is not read by schedule = 'fixed'.*'uniform' or"),
        (LoopConfig(schedule="uniform", mean_loops=2.0), r"mean_loops = 2\.0: is not read.*'poisson_lognormal'"),
        (LoopConfig(schedule="grow", grow_steps=5, loops=[1]), r"loops = \[1\]: is not read.*'list'"),
        (LoopConfig(grow_steps=5), r"grow_steps = 5: is not read.*'grow'"),
        (LoopConfig(sigma=1.0), r"sigma = 1\.0: is not read.*'poisson_lognormal'"),
        (LoopConfig(schedule="uniform", min_loops=0), r"min_loops = 0: must be positive"),
        (LoopConfig(schedule="uniform", min_loops=5), r"min_loops = 5: is more than n_loops = 4.*raise n_loops"),
        (LoopConfig(schedule="poisson_lognormal"), r"mean_loops = 0\.0: must be more than 1"),
        (LoopConfig(schedule="poisson_lognormal", mean_loops=2.0, min_loops=3), "no less than min_loops = 3"),
        (LoopConfig(schedule="poisson_lognormal", mean_loops=9.0), r"mean_loops = 9\.0: is more than n_loops = 4"),
        (LoopConfig(schedule="list"), r"loops = \[\]: must name"),
        (LoopConfig(schedule="list", loops=[0, 4]), r"loops = \[0, 4\]: each entry must be positive"),
        (LoopConfig(schedule="list", loops=[1, 2]), r"loops = \[1, 2\]: its largest entry must be n_loops = 4"),
        (LoopConfig(schedule="grow"), r"grow_steps = 0: must be positive"),
        (LoopConfig(backward_loops=5), r"backward_loops = 5: is more than n_loops = 4"),
    ],
)
def test_schedules_that_cannot_work_are_refused_by_name(config: LoopConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(loop=config).validate()


def test_an_embedding_that_no_gradient_reaches_is_refused() -> None:
    truncated = LoopConfig(schedule="uniform", min_loops=2, backward_loops=1)
    with pytest.raises(ConfigError, match=r"loop\.backward_loops = 1: no gradient.*at least 2.*tie_embeddings"):
        ModelConfig(loop=truncated, tie_embeddings=False).validate()
    ModelConfig(loop=truncated).validate()
    ModelConfig(loop=replace(truncated, min_loops=1), tie_embeddings=False).validate()
    model = build(replace(ZOO["gdn"], tie_embeddings=False))
    tokens = torch.zeros(1, 4, dtype=torch.long)
    model(tokens, targets=tokens, n_loops=2, n_backward_loops=1).backward()
    assert model.embedding.weight.grad is None and model.head is not None


@pytest.mark.parametrize("config", [LoopConfig(), UNIFORM, POISSON, LIST, GROW], ids=lambda c: c.schedule)
def test_schedules_that_work_are_accepted(config: LoopConfig) -> None:
    ModelConfig(n_loops=6, loop=config).validate()


@pytest.mark.parametrize("kind", ["gdn+full", "rwkv7", "full"])
def test_a_step_of_fewer_loops_is_that_of_a_model_built_with_so_many(kind: str) -> None:
    """Loss and gradients; rows of rho that did not run get zeros."""
    model, shallow = build(ZOO[kind]), build(replace(ZOO[kind], n_loops=2))
    weights = model.state_dict()
    shallow.load_state_dict(weights | {"core.rho": weights["core.rho"][:2]})
    tokens = torch.randint(0, 19, (2, 11), generator=torch.Generator().manual_seed(0))
    loss, expected = model(tokens, targets=tokens, n_loops=2), shallow(tokens, targets=tokens)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    for (name, p), q in zip(model.named_parameters(), shallow.parameters(), strict=True):
        if name == "core.rho":
            assert torch.equal(p.grad[:2], q.grad) and not p.grad[2:].any() and p.grad[:2].all(), name
        else:
            assert torch.equal(p.grad, q.grad), name


def flat(n_loops: int = 4, windows: list[int] | None = None) -> ModelConfig:
    mixers = MixersConfig(full=FullConfig(n_heads=4))
    loop = LoopConfig(windows=windows or [])
    return ModelConfig(
        vocab_size=512, dim=64, n_layers=2, n_loops=n_loops, mixer="full", ffn_dim=192, mixers=mixers, loop=loop
    )


def test_flops_of_fewer_and_of_truncated_loops_by_hand() -> None:
    config, length = flat(windows=[-1, 16, 16, 16]), 128
    model = build_on_meta(config, "reference")
    block = sum(p.numel() for p in model.core.blocks[0].parameters())
    head = 512 * 64
    full, window = 2 * 2 * 64 * length / 2, 2 * 2 * 64 * (16 * length - 16 * 16 / 2) / length
    loops = [2 * (2 * block + seen) for seen in (full, window, window, window)]  # forward, both layers
    for n, k, expected in (
        (4, 0, 3 * sum(loops)),
        (2, 0, 3 * sum(loops[:2])),
        (4, 1, sum(loops[:3]) + 3 * loops[3]),
        (3, 2, loops[0] + 3 * sum(loops[1:3])),
    ):
        assert training_flops_per_token(model, length, n, k).model == pytest.approx(expected + 6 * head), (n, k)
    assert training_flops_per_token(model, length) == training_flops_per_token(model, length, 4, 4)


@pytest.mark.parametrize(("n_loops", "n_backward_loops"), [(1, 0), (3, 0), (4, 1), (3, 2)])
def test_flops_agree_with_counting_what_torch_executes(n_loops: int, n_backward_loops: int) -> None:
    model = build_on_meta(flat(), "reference")
    tokens = torch.zeros(2, 128, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens, n_loops=n_loops, n_backward_loops=n_backward_loops).backward()
    ours = training_flops_per_token(model, 128, n_loops, n_backward_loops).model * tokens.numel()
    # torch counts all pairs of tokens, not the causal half: per layer as much again in each pass.
    k = n_backward_loops or n_loops
    other_half = 2 * 2 * 64 * 128 / 2 * 2 * ((n_loops - k) + 3 * k) * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(ours + other_half, rel=0.02)


def test_flops_of_a_schedule_are_the_mean_over_its_steps() -> None:
    model = build_on_meta(flat(6, windows=[-1, 16, 16, 16, 8, 8]), "reference")
    for config, n_steps, tolerance in ((GROW, 13, 1e-12), (replace(UNIFORM, backward_loops=2), 20_000, 5e-3)):
        schedule = LoopSchedule(config, 6, seed=0)
        steps = [schedule.loops(step) for step in range(1, n_steps + 1)]
        per_step = {n: training_flops_per_token(model, 128, n, min(n, config.backward_loops or n)) for n in {*steps}}
        for i in range(2):
            mean = sum(per_step[n][i] for n in steps) / n_steps
            assert scheduled_flops_per_token(model, 128, schedule, n_steps)[i] == pytest.approx(mean, rel=tolerance)
