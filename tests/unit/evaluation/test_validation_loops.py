"""Validation after several numbers of loops, against models that were built with so many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_loop_diagnostics import MODELS, build, text

from lt2titan.config.section import ConfigError
from lt2titan.evaluation.config import ValidationConfig
from lt2titan.evaluation.validate import evaluate
from lt2titan.model.init import build_on_meta
from lt2titan.model.lt2 import LT2

CPU = torch.device("cpu")


def shallow(model: LT2, n_loops: int) -> LT2:
    """Built with ``n_loops``, with the weights of ``model`` and the first rows of its rho."""
    config = model.config
    loop = replace(config.loop, windows=config.loop.windows[:n_loops])
    built = build_on_meta(replace(config, n_loops=n_loops, loop=loop), "reference")
    weights = model.state_dict() | {"core.rho": model.core.rho[:n_loops]}
    built.load_state_dict({name: w.detach() for name, w in weights.items()}, assign=True)
    return built


@pytest.mark.parametrize("document_mask", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("kind", MODELS)
def test_losses_are_those_of_models_built_with_fewer_loops(kind: str, document_mask: bool) -> None:
    model, batches = build(**MODELS[kind]), text(document_mask)
    result = evaluate(model, batches, CPU, loops=[3, 1, 2])
    assert list(result.loss_at) == [1, 2, 3]
    for n, loss in result.loss_at.items():
        assert loss == evaluate(shallow(model, n), batches, CPU).loss
    assert len({*result.loss_at.values()}) == 3
    assert result._replace(loss_at={}) == evaluate(model, batches, CPU)
    assert model.core.observer is None


@pytest.mark.parametrize("loops", [[0], [4], [-1, 2]])
def test_loops_that_the_model_does_not_have_are_refused(loops: list[int]) -> None:
    with pytest.raises(ValueError, match="a model of 3: choose 1 to 3"):
        evaluate(build("gdn"), text(document_mask=False), CPU, loops)


def test_configured_loops_are_checked() -> None:
    ValidationConfig(loops=[1, 4]).validate()
    ValidationConfig(loops=[1, 4]).validate_model(4)
    for loops in ([0], [2, 2]):
        with pytest.raises(ConfigError, match=r"loops.*different positive numbers"):
            ValidationConfig(loops=loops).validate()
    with pytest.raises(ConfigError, match=r"loops = \[1, 4\]: there are no more than model\.n_loops = 3"):
        ValidationConfig(loops=[1, 4]).validate_model(3)
