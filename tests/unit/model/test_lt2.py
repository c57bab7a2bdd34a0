"""The whole model against another implementation, and what a causal, looped, packed model must never do."""

from __future__ import annotations

import naive_lt2
import pytest
import torch
import torch.nn.functional as F
from model_zoo import ZOO, build, small

from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.model.context import rotary_tables
from lt2titan.model.head import CHUNK, IGNORE_INDEX, loss_sum
from lt2titan.model.init import build_on_meta, materialise
from lt2titan.model.recompute import RecomputePlan

kinds = pytest.mark.parametrize("kind", ZOO)


@kinds
def test_logits_equal_those_of_a_naive_implementation(kind: str) -> None:
    model = build(ZOO[kind])
    tokens = torch.randint(0, 19, (2, 13), generator=torch.Generator().manual_seed(1))
    parameters = {name: p.detach().numpy() for name, p in model.named_parameters()}
    logits = model(tokens)
    for row in range(2):
        expected = torch.from_numpy(naive_lt2.logits(parameters, ZOO[kind], tokens[row].tolist()))
        # RoPE tables are rounded to fp32; everything else is fp64 on both sides.
        torch.testing.assert_close(logits[row], expected, atol=1e-6, rtol=1e-6)


@kinds
def test_a_token_never_changes_logits_before_it(kind: str) -> None:
    model = build(ZOO[kind])
    tokens = torch.randint(0, 19, (1, 40), generator=torch.Generator().manual_seed(2))
    before = model(tokens)
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 19
    after = model(changed)
    torch.testing.assert_close(after[:, :20], before[:, :20], atol=1e-12, rtol=0)
    assert (after[:, 20] - before[:, 20]).abs().max() > 1e-3


@kinds
def test_packed_documents_give_the_logits_of_each_alone(kind: str) -> None:
    model = build(ZOO[kind])
    lengths = [7, 1, 20, 2, 10]
    tokens = torch.randint(0, 19, (2, sum(lengths) // 2), generator=torch.Generator().manual_seed(3))
    # Boundaries over the flattened rows, a boundary at the row's end, and empty documents as padding.
    ends = torch.tensor([0, 7, 8, 20, 28, 30, 40, 40, 40], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in ends.diff().tolist()]).view(2, -1)
    packed = model(
        tokens, positions=positions, cu_seqlens=ends, chunk_indices=make_chunk_indices(ends), max_seqlen=20
    ).reshape(40, -1)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        if end > start:
            alone = model(tokens.reshape(1, -1)[:, start:end])[0]
            torch.testing.assert_close(packed[start:end], alone, atol=1e-10, rtol=0)


def test_window_layers_see_exactly_as_far_as_loops_and_layers_reach() -> None:
    """T loops over N layers of window w: token i depends on the last min(i + 1, T N (w - 1) + 1) tokens."""
    model = build(small("window", n_layers=2, n_loops=2))
    reach = 2 * 2 * (5 - 1) + 1
    embedded = model.embedding(torch.randint(0, 19, (1, 30), generator=torch.Generator().manual_seed(5)))
    embedded = embedded.detach().requires_grad_()
    from lt2titan.model.context import Context

    positions = torch.arange(30)[None]
    context = Context(positions, {4: rotary_tables(positions, 4, 1e4)})
    model.core(embedded, context)[0][0, 29].sum().backward()
    assert embedded.grad is not None
    seen = embedded.grad[0].abs().sum(-1) > 0
    assert seen.tolist() == [i > 29 - reach for i in range(30)]


def test_loss_in_chunks_equals_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(6)
    n_tokens = 2 * CHUNK + 17
    hidden = torch.randn(1, n_tokens, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (1, n_tokens), generator=generator)
    targets[0, ::3] = IGNORE_INDEX
    loss = loss_sum(hidden, weight, targets)
    grads = torch.autograd.grad(loss, [hidden, weight])
    valid = targets[0] >= 0
    expected = F.cross_entropy((hidden @ weight.T)[0][valid], targets[0][valid], reduction="sum")
    torch.testing.assert_close(loss, expected)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_block_recomputation_changes_no_gradient() -> None:
    tokens = torch.randint(0, 19, (2, 9), generator=torch.Generator().manual_seed(7))
    gradients = []
    for recompute in (False, True):
        model = build(ZOO["gdn+full"])
        model.core.recompute = RecomputePlan(blocks=recompute)
        model(tokens, targets=tokens).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        assert grad is not None
        torch.testing.assert_close(gradients[1][name], grad, atol=1e-12, rtol=0)


def test_initial_values_follow_the_paper() -> None:
    config = small("gdn", "full", dim=256, ffn_dim=512, vocab_size=500)
    model = build_on_meta(config, "reference")
    materialise(model, torch.device("cpu"), seed=1)
    values = dict(model.named_parameters())
    sigma = 256**-0.5
    # A normal cut off at three sigmas has 0.987 of its standard deviation.
    for name, std in {
        "embedding.weight": sigma,
        "core.blocks.0.mixer.q_proj.weight": sigma,
        "core.blocks.0.mixer.o_proj.weight": sigma,
        "core.blocks.2.mixer.v_proj.weight": sigma,
        "core.blocks.0.ffn.gate_proj.weight": sigma,
        "core.blocks.0.ffn.down_proj.weight": 512**-0.5,
    }.items():
        assert values[name].std().item() == pytest.approx(0.987 * std, rel=0.03), name
        assert values[name].abs().max().item() <= 3 * std, name
    for name in ("core.rho", "core.blocks.2.mixer.gate_proj.weight"):
        assert values[name].abs().max() == 0, name
    for name in ("norm.weight", "core.blocks.0.mixer_norm.weight", "core.blocks.0.mixer.o_norm"):
        assert (values[name] == 1).all(), name
    assert values["core.blocks.0.mixer.A_log"].exp().max() <= 16
    dt = F.softplus(values["core.blocks.0.mixer.dt_bias"])
    assert dt.min() >= 0.99e-3 and dt.max() <= 1.01e-1


def test_initial_values_depend_on_the_seed_and_the_name_alone() -> None:
    one, same, other = (build_on_meta(ZOO["gdn"], "reference") for _ in range(3))
    deeper = build_on_meta(small("gdn", n_layers=3), "reference")
    for model, seed in ((one, 1), (same, 1), (other, 2), (deeper, 1)):
        materialise(model, torch.device("cpu"), seed)
    name = "core.blocks.1.mixer.q_proj.weight"
    values = [dict(m.named_parameters())[name] for m in (one, same, other, deeper)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[3])
    assert not torch.equal(values[0], values[2])
