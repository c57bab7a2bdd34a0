"""Running fewer loops than were built, and gradients through the last ones only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_zoo import ZOO, build

from lt2titan.model.recompute import RecomputePlan

TOKENS = torch.randint(0, 19, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["gdn+full", "rwkv7"])
@pytest.mark.parametrize("n_loops", [1, 2, 3])
def test_fewer_loops_use_the_first_rows_of_rho(kind: str, n_loops: int) -> None:
    model, shallow = build(ZOO[kind]), build(replace(ZOO[kind], n_loops=n_loops))
    weights = model.state_dict()
    weights["core.rho"] = weights["core.rho"][:n_loops]
    shallow.load_state_dict(weights)
    torch.testing.assert_close(model(TOKENS, n_loops=n_loops), shallow(TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_through_the_last_loops_are_those_of_a_detached_start(recompute: bool) -> None:
    model = build(ZOO["gdn+full"])
    model.core.recompute = RecomputePlan(blocks=recompute)
    model(TOKENS, targets=TOKENS, n_backward_loops=1).backward()
    got = {name: p.grad for name, p in model.named_parameters()}

    reference = build(ZOO["gdn+full"])
    outputs = []
    core = reference.core
    with torch.no_grad(), core.observed_by(observer := _KeepLoops(outputs)):
        loss = reference(TOKENS, targets=TOKENS)
    assert observer is not None and len(outputs) == 3
    # The last loop and the head once more, from the state that the loops before left behind.
    alone = build(replace(ZOO["gdn+full"], n_loops=1))
    weights = reference.state_dict()
    weights["core.rho"] = weights["core.rho"][2:]
    alone.load_state_dict(weights)
    alone.embedding.register_forward_hook(lambda *_: outputs[1])
    again = alone(TOKENS, targets=TOKENS)
    again.backward()
    torch.testing.assert_close(again, loss)
    for name, p in alone.named_parameters():
        mine = got[name][2:] if name == "core.rho" else got[name]
        torch.testing.assert_close(mine, p.grad, msg=name)


class _KeepLoops:
    def __init__(self, outputs: list[torch.Tensor]) -> None:
        self.outputs = outputs

    def after_block(self, *_: object) -> None: ...

    def after_loop(self, loop: int, before: torch.Tensor, after: torch.Tensor, rho: torch.Tensor) -> None:
        self.outputs.append(after)


@pytest.mark.parametrize("options", [{"n_loops": 4}, {"n_loops": -1}, {"n_loops": 2, "n_backward_loops": 3}])
def test_impossible_loops_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a model of 3 loops"):
        build(ZOO["gdn"])(TOKENS, **options)
