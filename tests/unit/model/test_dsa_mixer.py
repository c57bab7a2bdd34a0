"""The DSA mixer: a loss that trains its indexer alone, phases, reuse over loops, full attention if all is chosen."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import dsa_truth
import pytest
import torch
from model_zoo import MIXERS, REUSING, ZOO, build, small
from torch import Tensor

from lt2titan.config.section import ConfigError
from lt2titan.kernels.dsa import dsa_select
from lt2titan.model.block import Block
from lt2titan.model.config import HybridConfig, LoopConfig, ModelConfig
from lt2titan.model.context import Context
from lt2titan.model.flops import training_flops_per_token
from lt2titan.model.indexer_schedule import IndexerSchedule
from lt2titan.model.init import build_on_meta
from lt2titan.model.looped_core import LoopObserver
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.config import DSAConfig, FullConfig, MixersConfig
from lt2titan.model.mixers.dsa import DSA, INDEXER_KL
from lt2titan.model.recompute import RecomputePlan
from lt2titan.optim.clip import clip_grad_norm
from lt2titan.parallel.config.tensor_parallel import check_tensor_parallel

TOKENS = torch.randint(0, 19, (2, 15), generator=torch.Generator().manual_seed(0))
PHASES = pytest.mark.parametrize("sees_all", [False, True], ids=["chosen", "all"])


def run(model: LT2, weight: float, **options: object) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Cross-entropy, KL, and the gradients of the former plus ``weight`` times the latter."""
    model.zero_grad()
    loss, auxiliary = model(TOKENS, targets=TOKENS, with_auxiliary=True, **options)
    (loss + weight * auxiliary[INDEXER_KL]).backward()
    return loss.detach(), auxiliary[INDEXER_KL].detach(), {n: p.grad for n, p in model.named_parameters()}


@PHASES
def test_each_loss_trains_its_own_parameters(sees_all: bool) -> None:
    """Bitwise: whatever the KL weighs, the others' gradients are those of the cross-entropy, and the indexers' grow
    with it."""
    model = build(ZOO["dsa+full"])
    results = [run(model, weight, sees_all=sees_all) for weight in (0.0, 1.0, 2.0)]
    for name, grad in results[0][2].items():
        once, twice = results[1][2][name], results[2][2][name]
        assert grad is not None and once is not None and twice is not None, name
        if ".mixer.index_" in name:
            assert grad.abs().max() == 0 and once.abs().max() > 1e-6, name
            torch.testing.assert_close(twice, 2 * once)
        else:
            assert torch.equal(grad, once) and torch.equal(grad, twice), name
    loss = model(TOKENS, targets=TOKENS, sees_all=sees_all)
    assert torch.equal(loss, results[2][0])


def test_the_indexers_gradients_are_clipped_by_their_own_norm() -> None:
    model = build(ZOO["dsa+full"])
    gradients = {"core.rho": 3.0, "norm.weight": 4.0, "core.blocks.0.mixer.index_q_proj.weight": 12.0}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.view(-1)[0] = gradients.get(name, 0.0)
    assert [norm.item() for norm in clip_grad_norm(model, 1.0)] == pytest.approx([5, 3, 4, 12])
    after = {name: p.grad.view(-1)[0].item() for name, p in model.named_parameters() if p.grad is not None}
    assert [after[name] for name in gradients] == pytest.approx([0.6, 0.8, 1.0], rel=1e-5)


class Inputs(LoopObserver):
    """What each DSA layer read in each visit."""

    def __init__(self) -> None:
        self.visits: list[tuple[Block, Tensor, Context]] = []

    def after_block(self, block: Block, x: Tensor, context: Context) -> None:
        if isinstance(block.mixer, DSA):
            self.visits.append((block, block.mixer_norm(x).detach(), context))


@PHASES
def test_the_kl_is_that_of_every_visit_s_scores_and_attention(sees_all: bool) -> None:
    """Written out with L x L tensors from what the layers read."""
    model, observer = build(ZOO["dsa"]), Inputs()
    with model.core.observed_by(observer):
        _, kl, _ = run(model, 1.0, sees_all=sees_all)
    expected = torch.zeros((), dtype=torch.float64)
    for block, x, context in observer.visits:
        mixer = block.mixer
        q, k, v = mixer.heads(x, context)
        scores = dsa_truth.scores(*mixer.index(x, context))
        seen = dsa_truth.seen_mask(TOKENS.shape[1])
        mask = seen.expand_as(scores) if sees_all else dsa_truth.chosen(scores, seen, mixer.top_k)
        expected += dsa_truth.kl(scores, dsa_truth.attention(q, k, v, mask)[1], mask)
    assert len(observer.visits) == 2 * 3
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=0)


def test_everything_chosen_is_full_attention_exactly() -> None:
    """Bitwise the full mixer with the same weights; the indexer still learns."""
    full = build(small("full"))
    dsa = build(small("dsa", mixers=replace(MIXERS, dsa=replace(MIXERS.dsa, top_k=TOKENS.shape[1]))))
    shared = full.state_dict()
    missing = dsa.load_state_dict(shared, strict=False)
    assert not missing.unexpected_keys and all(".index_" in name for name in missing.missing_keys)
    assert torch.equal(dsa(TOKENS), full(TOKENS))
    loss, kl, gradients = run(dsa, 1.0)
    want = full(TOKENS, targets=TOKENS)
    want.backward()
    assert torch.equal(loss, want.detach()) and kl > 0
    for name, parameter in full.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name
    fewer = build(small("dsa"))
    fewer.load_state_dict(dsa.state_dict())
    assert torch.equal(fewer(TOKENS, sees_all=True), full(TOKENS))
    assert (fewer(TOKENS) - full(TOKENS)).abs().max() > 1e-3
    one_less = build(small("dsa", mixers=replace(MIXERS, dsa=replace(MIXERS.dsa, top_k=TOKENS.shape[1] - 1))))
    one_less.load_state_dict(dsa.state_dict())
    torch.testing.assert_close(one_less(TOKENS)[:, :-1], full(TOKENS)[:, :-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("plan", [RecomputePlan(blocks=True), RecomputePlan(loops=True)], ids=["blocks", "loops"])
@PHASES
@pytest.mark.parametrize("kind", ["dsa", "gdn+dsa, forced tokens, reuse"])
def test_recomputation_changes_nothing(kind: str, plan: RecomputePlan, sees_all: bool) -> None:
    model = build(ZOO[kind])
    want = run(model, 0.7, sees_all=sees_all)
    model.core.recompute = plan
    torch.testing.assert_close(run(model, 0.7, sees_all=sees_all), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("loop", "reuse_every", "learns"),
    [
        (LoopConfig(backward_loops=1), 2, False),  # the last of 4 loops reuses what the third has chosen
        (LoopConfig(backward_loops=2), 2, True),
        (LoopConfig(backward_loops=1), 3, True),
        (LoopConfig(backward_loops=3), 4, False),
        (LoopConfig(), 4, True),
        (LoopConfig(schedule="list", loops=[3, 4], backward_loops=1), 2, True),
        (LoopConfig(schedule="uniform", min_loops=2, backward_loops=1), 4, False),
    ],
)
def test_indexers_that_would_never_learn_are_refused(loop: LoopConfig, reuse_every: int, learns: bool) -> None:
    mixers = MixersConfig(dsa=DSAConfig(n_heads=4, reuse_every=reuse_every))
    model = ModelConfig(mixer="dsa", hybrid=HybridConfig(), mixers=mixers, loop=loop)
    refused = pytest.raises(
        ConfigError, match=rf"loop.backward_loops = {loop.backward_loops}: .*every {reuse_every} loops"
    )
    with nullcontext() if learns else refused:
        model.validate()


@pytest.mark.parametrize(("n_loops", "n_backward_loops"), [(3, 0), (2, 0), (3, 1), (3, 2)])
def test_only_loops_with_gradients_that_choose_are_learned_from(n_loops: int, n_backward_loops: int) -> None:
    config = ZOO["gdn+dsa, forced tokens, reuse"]  # six layers, two of them DSA; loops 0 and 2 choose
    model, observer = build(config), Inputs()
    with model.core.observed_by(observer):
        _, kl, gradients = run(model, 1.0, n_loops=n_loops, n_backward_loops=n_backward_loops)
    first = n_loops - (n_backward_loops or n_loops)
    learning = [loop for loop in range(first, n_loops) if loop % 2 == 0]
    assert IndexerSchedule(config).n_visits(n_loops, n_backward_loops or n_loops) == 2 * len(learning)
    expected = torch.zeros((), dtype=torch.float64)
    for i, (block, x, context) in enumerate(observer.visits):
        assert context.reuses_selection == (i // 2 % 2 == 1)
        if i // 2 in learning:
            q, k, v = block.mixer.heads(x, context)
            scores = dsa_truth.scores(*block.mixer.index(x, context))
            mask = dsa_truth.chosen(scores, dsa_truth.seen_mask(TOKENS.shape[1]), 5, True, 2)
            expected += dsa_truth.kl(scores, dsa_truth.attention(q, k, v, mask)[1], mask)
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=0)
    index = [grad for name, grad in gradients.items() if ".index_" in name]
    assert all((grad is not None and grad.abs().max() > 0) == bool(learning) for grad in index)


def test_loops_that_reuse_see_what_was_chosen_before() -> None:
    """The choice of a loop that reuses is the last one's, though its own scores would choose otherwise."""
    config = replace(ZOO["gdn+dsa, forced tokens, reuse"], n_layers=3)
    model, observer = build(config), Inputs()
    with model.core.observed_by(observer), torch.no_grad():
        model(TOKENS)
    (block, x, context), (_, x_next, _), (_, x_last, _) = observer.visits
    options = {"top_k": 5, "forced_first": True, "forced_local": 2, "backend": "reference"}
    chosen, not_chosen = (dsa_select(*block.mixer.index(y, context), **options) for y in (x, x_next))
    assert not torch.equal(chosen, not_chosen)
    q, k, v = block.mixer.heads(x_next, context)
    want = block.mixer.o_proj(dsa_truth.attention(q, k, v, dsa_truth.as_mask(chosen))[0].flatten(-2))
    reusing = replace(context, reuses_selection=True)
    got, carry = block.mixer(x_next, reusing, {"dsa_selection_0": chosen})
    torch.testing.assert_close(got, want)
    assert carry["dsa_selection_0"] is chosen
    assert not torch.equal(x_last, x)


def test_the_schedule_is_a_function_of_the_step() -> None:
    config = small("gdn", "dsa", n_layers=6, mixers=replace(MIXERS, dsa=replace(REUSING, warmup_steps=3, kl_weight=2)))
    schedule = IndexerSchedule(config)
    assert [schedule.sees_all(step) for step in range(6)] == [True, True, True, True, False, False]
    assert (
        schedule.phases(1, 9) == [False, True] and schedule.phases(4, 9) == [False] and schedule.phases(1, 3) == [True]
    )
    assert schedule.objective(torch.tensor(6.0), 4) == 3
    assert "all earlier tokens for 3 steps, then the 5 that its indexer chooses, anew in one of 2 loops" in (
        schedule.describe()
    )
    without = IndexerSchedule(small("gdn"))
    assert not without.is_needed and not without.sees_all(1) and without.n_visits(3, 3) == 0
    at_once = IndexerSchedule(small("dsa", mixers=replace(MIXERS, dsa=replace(MIXERS.dsa, warmup_steps=0))))
    assert not at_once.sees_all(0) and not at_once.sees_all(1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DSAConfig(n_heads=3), "n_heads = 3: does not split dim 64"),
        (DSAConfig(n_heads=4, n_kv_heads=3), "n_kv_heads = 3: does not divide n_heads 4"),
        (DSAConfig(top_k=0), "top_k = 0: must be positive"),
        (DSAConfig(index_head_dim=7), "index_head_dim = 7: must be even"),
        (DSAConfig(top_k=4, forced_first=True, forced_local=4), "top_k = 4: must hold the 5 tokens"),
        (DSAConfig(reuse_every=0), "reuse_every = 0: must be positive"),
        (DSAConfig(warmup_steps=-1), "warmup_steps = -1: must not be negative"),
    ],
)
def test_sizes_that_do_not_fit_say_why(config: DSAConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"mixers\.dsa\.{message}"):
        ModelConfig(dim=64, mixer="dsa", mixers=MixersConfig(dsa=config)).validate()


@pytest.mark.parametrize("n_kv_heads", [0, 1, 2, 6])
def test_ranks_split_query_heads_whatever_the_key_heads_are(n_kv_heads: int) -> None:
    mixers = MixersConfig(dsa=DSAConfig(n_heads=12, n_kv_heads=n_kv_heads))
    config = ModelConfig(dim=48, mixer="dsa", ffn_dim=48, vocab_size=48, mixers=mixers)
    for degree in (2, 4, 12):
        check_tensor_parallel(config, degree)
    with pytest.raises(ConfigError, match=r"does not split model\.mixers\.dsa\.n_heads = 12 .*: \[1, 2, 3, 4, 6, 12\]"):
        check_tensor_parallel(config, 8)


def test_flops_are_those_of_what_is_executed() -> None:
    """Against full attention of the same sizes, by hand."""
    dim, length, top_k = 64, 4096, 256
    dsa = DSAConfig(n_heads=4, n_kv_heads=4, top_k=top_k, n_index_heads=2, index_head_dim=16)
    settings = {"dim": dim, "n_layers": 1, "n_loops": 4, "ffn_dim": 64}
    mixers = MixersConfig(full=FullConfig(n_heads=4), dsa=dsa)
    model = build_on_meta(ModelConfig(mixer="full", mixers=mixers, **settings), "reference")
    full = training_flops_per_token(model, length)

    def of(sees_all: bool = False, **changes: int) -> float:
        config = ModelConfig(mixer="dsa", mixers=MixersConfig(dsa=replace(dsa, **changes)), **settings)
        return training_flops_per_token(build_on_meta(config, "reference"), length, sees_all=sees_all).model

    mean_seen, mean_chosen = length / 2, top_k - top_k**2 / (2 * length)
    projections = dim * (2 * 16 + 16 + 2)
    norm = 2 * 16
    attention = 4 * dim * (mean_chosen - mean_seen) * 3
    scores = 2 * 2 * 16 * mean_seen
    kl = 3 * 2 * 2 * 16 * mean_chosen
    # Forward and the weights' gradient, but none for the indexer's input.
    visit = attention + 4.0 * (projections + norm) + scores + kl
    assert of() == pytest.approx(full.model + 4 * visit)
    assert of(reuse_every=2) == pytest.approx(full.model + 2 * visit + 2 * attention)
    assert of(sees_all=True) == pytest.approx(of(top_k=length))
    assert of(top_k=length) == pytest.approx(full.model + 4 * (4.0 * (projections + norm) + 3 * 2 * 2 * 16 * mean_seen))
