"""Which maps multiply in float8, what is refused, and what memory that takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

pytest.importorskip("torchao", reason="float8 needs torchao")

from float8_models import CPU, GATHERED, N_MAPS, ROWWISE, TENSORWISE, build, config, microbatches
from inductor_graphs import inductor_without_kernels
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_training_tensor import Float8TrainingTensor

from lt2titan.config.section import ConfigError
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.head import chunk_loss_sum
from lt2titan.model.init import build_on_meta
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.config import FullConfig, GDNConfig, KDAConfig, MixersConfig
from lt2titan.parallel.activation_checkpoint import recompute_plan
from lt2titan.parallel.activation_memory import core_memory
from lt2titan.parallel.config import Float8Config
from lt2titan.parallel.float8 import Float8Plan, apply_float8, gathered_bytes, plan_float8
from lt2titan.parallel.float8_linear import Float8Linear, to_float8


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- which maps -----------------------------------------------------------------------------------


def converted(plan: Float8Plan, model_config: ModelConfig, n_tensor: int = 1) -> list[str]:
    model = build_on_meta(model_config, "reference")
    apply_float8(model, plan, n_tensor)
    for name, module in model.named_modules():
        assert not isinstance(module, Float8Linear) or (isinstance(module, Linear) and module.init_std > 0), name
    return [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]


def large(dim: int) -> ModelConfig:
    """One gdn and one full layer of LT2's sizes."""
    return ModelConfig(
        vocab_size=2048,
        dim=dim,
        n_layers=2,
        tie_embeddings=False,
        mixer="gdn",
        hybrid=HybridConfig(mixer="full", ratio=1),
        mixers=MixersConfig(full=FullConfig(n_heads=16), gdn=GDNConfig(n_heads=16)),
    )


def names(*leaves: str, block: int) -> list[str]:
    return [f"core.blocks.{block}.{leaf}" for leaf in leaves]


def test_small_maps_and_the_head_are_left_alone() -> None:
    everything = Float8Plan("tensorwise", emulate=True, auto_filter=False)
    ffn = ["ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"]
    # Of the 0.6B model: a_proj and b_proj have 16 features, the head is none of the blocks'.
    gdn = [f"mixer.{leaf}_proj" for leaf in ("q", "k", "v", "gate", "o")]
    full = [f"mixer.{leaf}_proj" for leaf in ("q", "k", "v", "o")]
    assert sorted(converted(everything, large(1024))) == sorted(
        names(*gdn, *ffn, block=0) + names(*full, *ffn, block=1)
    )
    # kda's low-rank maps have a side of its head dimension.
    kda = replace(
        large(512), mixer="kda", n_layers=1, hybrid=HybridConfig(), mixers=MixersConfig(kda=KDAConfig(n_heads=4))
    )
    assert all(min(m.weight.shape) >= 256 for m in float8_maps(everything, kda))
    assert (
        0
        < len(converted(everything, kda))
        < sum(isinstance(m, Linear) for m in build_on_meta(kda, "reference").modules())
    )


def float8_maps(plan: Float8Plan, model_config: ModelConfig) -> list[Float8Linear]:
    model = build_on_meta(model_config, "reference")
    apply_float8(model, plan)
    return [module for module in model.modules() if isinstance(module, Float8Linear)]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("dim", [1024, 2048, 4096])
def test_shapes_that_pay_are_those_of_torchao(recipe: str, dim: int) -> None:
    from torchao.float8 import _auto_filter_for_recipe

    pays = _auto_filter_for_recipe(recipe, filter_fqns=["a_proj", "b_proj", "head"])
    model = build_on_meta(large(dim), "reference")
    expected = [name for name, module in model.named_modules() if pays(module, name)]
    plan = Float8Plan(recipe, emulate=True)
    if expected:
        assert converted(plan, large(dim)) == expected
    else:
        with pytest.raises(ConfigError, match="no linear map of this model qualifies"):
            converted(plan, large(dim))


def test_named_maps_and_indivisible_sides_are_left_alone() -> None:
    found = converted(replace(TENSORWISE, filter_fqns=["ffn", "blocks.2"]), config())
    assert sorted(found) == sorted(
        f"core.blocks.{i}.mixer.{leaf}_proj" for i in (0, 1) for leaf in ("q", "k", "v", "gate", "o")
    )
    odd = replace(config(), ffn_dim=88)
    assert not any("ffn" in name for name in converted(TENSORWISE, odd))
    # Split over 4 ranks, sides of 96 would be no multiples of 16 any more; those of 64 would.
    assert not any("ffn" in name for name in converted(TENSORWISE, config(), n_tensor=4))
    assert "core.blocks.2.mixer.q_proj" in converted(TENSORWISE, config(), n_tensor=4)


# --- what is refused ------------------------------------------------------------------------------


def plan_of(section: Float8Config, n_tokens: int = 64) -> Float8Plan | None:
    section.validate()
    return plan_float8(section, device=CPU, compiled=True, n_tokens=n_tokens)


def test_plan() -> None:
    assert plan_of(Float8Config()) is None
    plan = plan_of(Float8Config(recipe="tensorwise", emulate=True, filter_fqns=["ffn"]), n_tokens=7)
    assert plan == Float8Plan("tensorwise", ["ffn"], all_gather=True, emulate=True)
    for section in (
        Float8Config(recipe="tensorwise", emulate=True, all_gather="off"),
        Float8Config(recipe="rowwise", emulate=True),
    ):
        plan = plan_of(section)
        assert plan is not None and not plan.all_gather


@pytest.mark.parametrize(
    ("section", "arguments", "message"),
    [
        ({"recipe": "rowwise"}, {}, "float8.recipe = 'rowwise': .*need a GPU; set float8.emulate"),
        ({"recipe": "rowwise", "all_gather": "on"}, {}, "all_gather = 'on': needs float8.recipe = \"tensorwise\""),
        ({"filter_fqns": [""]}, {}, "filter_fqns"),
        ({"min_size": 0}, {}, "min_size = 0"),
    ],
)
def test_refusals(section: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(Float8Config(**section), **arguments)


@pytest.mark.parametrize(
    ("recipe", "capability", "arguments", "message"),
    [
        ("tensorwise", (8, 9), {}, ""),
        ("rowwise", (9, 0), {}, ""),
        ("tensorwise", (8, 0), {}, "capability 8.9, and this is an old one"),
        ("rowwise", (8, 9), {}, "capability 9.0, and this is an old one"),
        ("tensorwise", (9, 0), {"compiled": False}, "slower than bfloat16 without compilation; .*float8.allow_eager"),
        ("tensorwise", (9, 0), {"compiled": False, "allow_eager": True}, ""),
        ("tensorwise", (9, 0), {"n_tokens": 7}, "7 tokens per rank .* multiple of 16"),
        ("rowwise_with_gw_hp", (9, 0), {"n_tokens": 7}, ""),
    ],
)
def test_what_a_gpu_is_asked_for(
    recipe: str, capability: tuple[int, int], arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    options = {"compiled": True, "n_tokens": 64} | arguments
    section = Float8Config(recipe=recipe, allow_eager=options.pop("allow_eager", False))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        assert plan_float8(section, device=torch.device("cuda"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_validation_may_have_any_number_of_tokens(recipe: str) -> None:
    """By torch's own rules for a GPU's products, on fake tensors: of 7 tokens a map takes, and no gradient of a weight
    could be made in float8. That is why only microbatches are checked."""
    with torch.device("meta"):
        linear = to_float8(Linear(64, 96, init_std=0.02), Float8LinearConfig.from_recipe_name(recipe), False)
    with FakeTensorMode(), torch.no_grad():
        linear.weight = nn.Parameter(torch.empty(96, 64, device="cuda", dtype=torch.bfloat16))
        assert linear(torch.empty(7, 64, device="cuda", dtype=torch.bfloat16)).shape == (7, 96)
        dy, x = (torch.empty(n, 7, device="cuda").to(torch.float8_e4m3fn) for n in (96, 64))
        scale = torch.ones((), device="cuda")
        with pytest.raises(RuntimeError, match=r"divisible by 16, but got .*=7"):
            torch._scaled_mm(dy, x.t(), scale, scale, out_dtype=torch.bfloat16)


def test_a_model_without_a_fitting_map_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no linear map of this model qualifies.*float8.filter_fqns"):
        converted(replace(TENSORWISE, filter_fqns=["core"]), config())


def test_it_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lt2titan"):
        converted(GATHERED, config())
        converted(TENSORWISE, config())
    expected = f"float8: tensorwise (emulated), {N_MAPS} of {N_MAPS + 4} linear maps, weights "
    assert caplog.messages == [expected + "gathered in float8", expected + "cast at every visit"]


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "backend"),
    [
        *((plan, "") for plan in (TENSORWISE, GATHERED, ROWWISE)),
        (GATHERED, inductor_without_kernels),
        pytest.param(TENSORWISE, inductor_without_kernels, marks=pytest.mark.wide),
        pytest.param(ROWWISE, inductor_without_kernels, marks=pytest.mark.wide),
        pytest.param(GATHERED, "inductor", marks=pytest.mark.wide),
    ],
)
def test_what_is_kept_is_as_predicted(plan: Float8Plan, backend: Any) -> None:
    """Tensors that autograd saves, byte for byte."""
    shallow = replace(config(n_loops=1), n_layers=1, mixer="full", hybrid=HybridConfig())
    model = build_on_meta(shallow, "reference")
    apply_float8(model, plan)
    sizes = core_memory(model, batch_size=2, length=64, dtype=torch.float32, is_compiled=bool(backend))
    torch._dynamo.reset()
    model = build(plan, model_config=shallow, compile_backend=backend)
    model.chunk_loss = chunk_loss_sum  # is nothing that is measured
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    inputs: list[Any] = []
    model.core.register_forward_pre_hook(lambda core, arguments: inputs.extend(arguments[:2]))
    model(tokens, targets=tokens)  # compiles
    h, context = inputs
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        model.core(h, context)
    weights = storages(list(model.core.parameters()))
    kept = {key: size for key, size in storages(saved).items() if key not in weights}
    positions = context.positions.nbytes  # which autograd does not need
    assert sizes.under(recompute_plan("none", 0)).kept == sum(kept.values()) + positions
    torch._dynamo.reset()


def test_what_is_gathered_is_as_predicted() -> None:
    planned = build_on_meta(config(), "reference")
    apply_float8(planned, GATHERED)
    model = build(GATHERED)
    model(microbatches()[0])  # blocks stay gathered
    weights = [w._data if isinstance(w, Float8TrainingTensor) else w for w in model.core.blocks.parameters()]
    assert sum(w.nbytes for w in weights) == gathered_bytes(planned.core.blocks.parameters(), torch.float32)


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage, those inside of float8's wrapper too."""
    plain = [part for t in tensors for part in ([t._data, t._scale] if isinstance(t, Float8TrainingTensor) else [t])]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in plain}
