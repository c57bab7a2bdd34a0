"""What the LT2 paper claims of loops (arXiv 2605.20670, appendix B), seen in numbers on real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_zoo import MIXERS, build, small
from torch import Tensor

from lt2titan.model.mixers import gdn
from lt2titan.model.mixers.config import GDNConfig, WindowConfig


@pytest.mark.parametrize("n_loops", [1, 2, 3, 5])
def test_the_product_of_gdn_transitions_over_loops_reaches_rank_T(
    n_loops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token's transition in one loop is a (I - b k k^T): the identity but for rank 1. The keys of its T visits
    differ, so the product over loops is the identity but for rank T.

    A property of the product: the model keeps T separate states, and no state of it meets more than one of them.
    """
    visits: list[tuple[Tensor, Tensor]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **kwargs: object) -> object:
        visits.append((k[0, -1, 0].detach(), beta[0, -1, 0].detach()))
        return rule(q, k, v, g, beta, **kwargs)

    rule = gdn.gated_delta_rule
    monkeypatch.setattr(gdn, "gated_delta_rule", spy)
    mixers = replace(MIXERS, gdn=GDNConfig(n_heads=1, expand_k=1.0, expand_v=1.0))
    model = build(small("gdn", n_layers=1, n_loops=n_loops, mixers=mixers))
    model(torch.arange(9).view(1, -1))
    assert len(visits) == n_loops
    width = visits[0][0].numel()
    product = torch.eye(width, dtype=torch.float64)
    for k, beta in visits:
        product = (torch.eye(width, dtype=torch.float64) - beta * torch.outer(k, k)) @ product
    singular_values = torch.linalg.svdvals(torch.eye(width, dtype=torch.float64) - product)
    assert int((singular_values > 1e-10).sum()) == n_loops


@pytest.mark.parametrize("window, n_layers, n_loops", [(1, 2, 3), (2, 1, 4), (3, 2, 2), (4, 1, 3), (3, 3, 3)])
def test_loops_over_windows_see_exactly_so_far(window: int, n_layers: int, n_loops: int) -> None:
    """Token i (from 1) depends on exactly the last min(i, T N (w - 1) + 1) tokens."""
    mixers = replace(MIXERS, window=WindowConfig(n_heads=2, window=window))
    model = build(small("window", n_layers=n_layers, n_loops=n_loops, mixers=mixers))
    length = 22
    tokens = torch.randint(0, 19, (1, length), generator=torch.Generator().manual_seed(0))
    embedded: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    model.embedding.register_forward_hook(keep)
    logits = model(tokens)
    for i in range(1, length + 1):
        (gradient,) = torch.autograd.grad(logits[0, i - 1].sum(), embedded[0], retain_graph=True)
        seen = gradient[0].abs().sum(dim=-1) > 0
        n_seen = min(i, n_loops * n_layers * (window - 1) + 1)
        assert seen.nonzero().flatten().tolist() == list(range(i - n_seen, i)), i
