"""What is checked: every operator over the shapes that tend to break kernels, each case against fp64 on its own inputs.

A case draws inputs in fp64, rounds them to its dtype, runs the operator forward and backward through a random
projection of all its outputs, and compares with the definition on the same rounded inputs in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lt2titan.kernels.attention import attention, masked_attention
from lt2titan.kernels.check.case import DOCUMENTS, ONE_HEAD, Built, Case, Packing
from lt2titan.kernels.check.other_operators import (
    attention_definition,
    attention_inputs,
    convolution_inputs,
    norm_inputs,
)
from lt2titan.kernels.check.recurrences import RECURRENCES, Draw, Sizes
from lt2titan.kernels.check.sparse import (
    build_dsa,
    build_dsa_select,
    build_nsa,
    dsa_cases,
    dsa_select_cases,
    nsa_cases,
)
from lt2titan.kernels.gated_rms_norm import gated_rms_norm
from lt2titan.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from lt2titan.kernels.recurrence import state_dtype
from lt2titan.kernels.short_convolution import short_convolution
from lt2titan.kernels.short_convolution.reference import short_convolution_reference

PRECISE = ("g", "beta")
"""Per-token inputs that mixers compute and keep in fp32."""

FLOOR = 1e-2
"""Root mean square below which an error counts absolutely: operands are of order 1, so that much less is noise."""


def errors_of(case: Case, device: torch.device | str, backend: str) -> dict[str, float]:
    """Run a case; return the relative error ||got - expected|| / ||expected|| of every output and gradient."""
    packing = Packing(case, torch.device(device))
    built = _BUILD.get(case.operator, _recurrence)(case, packing, backend)
    inputs = {name: x.to(device).requires_grad_(not case.decode) for name, x in built.inputs.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    outputs, expected = built.run(inputs), built.define(exact)
    pairs = list(zip(built.names[: len(outputs)], outputs, expected, strict=True))
    if not case.decode:
        outputs, expected = zip(
            *((o, e) for o, e in zip(outputs, expected, strict=True) if o.requires_grad), strict=True
        )
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
        grads = torch.autograd.grad(outputs, list(inputs.values()), weights)
        expected_grads = torch.autograd.grad(expected, list(exact.values()), [w.double() for w in weights])
        pairs += zip((f"d{name}" for name in inputs), grads, expected_grads, strict=True)
    return {name: _relative(got, want) for name, got, want in pairs}


def _relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        raise ValueError(f"the operator returned {tuple(got.shape)}, its definition {tuple(want.shape)}")
    return float((got - want).norm() / want.norm().clamp(min=FLOOR * want.numel() ** 0.5))


def _recurrence(case: Case, packing: Packing, backend: str) -> Built:
    check = RECURRENCES[case.operator]
    operator = check.operator
    draw = Draw(packing.batch, packing.length, case.sizes, case.decay)
    dtype = case.dtype
    precise = torch.promote_types(dtype, torch.float32)
    tokens = check.inputs(draw)
    inputs = {
        name: x.to(precise if name in PRECISE else dtype) for name, x in zip(operator.input_names, tokens, strict=True)
    }
    if case.state or case.decode:
        shape = (packing.n_sequences, *case.sizes[1:])
        state = torch.randn(shape, dtype=torch.float64, generator=draw.generator)
        inputs["initial_state"] = state.to(state_dtype(inputs["q"]))
    scale = case.sizes.K**-0.5

    def call(tokens: list[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return operator(
            *tokens,
            scale=scale,
            initial_state=state,
            cu_seqlens=packing.cu_seqlens,
            chunk_indices=packing.chunk_indices,
            return_final_state=state is not None,
            backend=backend,
        )

    def run(x: dict[str, Tensor]) -> Sequence[Tensor]:
        tokens, state = [x[name] for name in operator.input_names], x.get("initial_state")
        if case.decode:
            outputs = []
            for t in range(packing.length):
                o, state = call([token[:, t : t + 1] for token in tokens], state)
                outputs.append(o)
            assert state is not None
            return torch.cat(outputs, dim=1), state
        return [o for o in call(tokens, state) if o is not None]

    def define(x: dict[str, Tensor]) -> Sequence[Tensor]:
        tokens, state = [x[name] for name in operator.input_names], x.get("initial_state")
        o, final_state = check.definition(*tokens, state, scale, packing.cu_seqlens)
        return (o,) if state is None else (o, final_state)

    return Built(inputs, run, define)


def _short_convolution(case: Case, packing: Packing, backend: str) -> Built:
    activation = case.options.get("activation", "silu")
    inputs = convolution_inputs(packing.batch, packing.length, packing.n_sequences, **case.options)
    if not case.state:
        del inputs["initial_state"]

    def call(x: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return short_convolution(
            **x,
            cu_seqlens=packing.cu_seqlens,
            chunk_indices=packing.chunk_indices,
            activation=activation,
            return_final_state=case.state,
            backend=backend,
        )

    def run(x: dict[str, Tensor]) -> Sequence[Tensor]:
        if case.decode:
            outputs, token = [], dict(x)
            for t in range(packing.length):
                y, state = call({**token, "x": x["x"][:, t : t + 1]})
                assert state is not None
                token["initial_state"] = state
                outputs.append(y)
            return torch.cat(outputs, dim=1), token["initial_state"]
        return [o for o in call(x) if o is not None]

    def define(x: dict[str, Tensor]) -> Sequence[Tensor]:
        optional = x.get("bias"), x.get("initial_state")
        outputs = short_convolution_reference(x["x"], x["weight"], *optional, packing.cu_seqlens, activation)
        return outputs if case.state else outputs[:1]

    return Built({name: x.to(case.dtype) for name, x in inputs.items()}, run, define)


def _gated_rms_norm(case: Case, packing: Packing, backend: str) -> Built:
    inputs = norm_inputs(packing.batch, packing.length, case.options["H"], case.options["D"])
    activation = case.options["activation"]
    return Built(
        {name: x.to(case.dtype) for name, x in inputs.items()},
        lambda x: (gated_rms_norm(**x, eps=1e-5, activation=activation, backend=backend),),
        lambda x: (gated_rms_norm_reference(x["x"], x["gate"], x["weight"], 1e-5, activation),),
    )


def _attention(case: Case, packing: Packing, backend: str) -> Built:
    window, n_before = case.options.get("window", 0), case.options.get("n_before", 0)
    inputs = attention_inputs(packing.batch, packing.length, case.sizes)
    cu_seqlens = packing.cu_seqlens
    if cu_seqlens is not None:
        cu_seqlens = (cu_seqlens - n_before).clamp(min=0)

    def run(x: dict[str, Tensor]) -> Sequence[Tensor]:
        if case.decode:  # one query at a time over the keys so far, as mixers do with their caches
            steps = []
            for t in range(packing.length):
                seen = torch.ones(1, 1, t + 1, dtype=torch.bool, device=x["q"].device)
                steps.append(masked_attention(x["q"][:, t : t + 1], x["k"][:, : t + 1], x["v"][:, : t + 1], seen))
            return (torch.cat(steps, dim=1),)
        y = attention(
            x["q"][:, n_before:],
            x["k"],
            x["v"],
            window=window,
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=packing.cu_seqlens,
            max_seqlen=packing.max_seqlen,
            backend=backend,
        )
        return (y,)

    return Built(
        {name: x.to(case.dtype) for name, x in inputs.items()},
        run,
        lambda x: (attention_definition(**x, window=window, documents=case.documents)[:, n_before:],),
    )


_BUILD: dict[str, Callable[[Case, Packing, str], Built]] = {
    "attention": _attention,
    "short_convolution": _short_convolution,
    "gated_rms_norm": _gated_rms_norm,
    "nsa": build_nsa,
    "dsa": build_dsa,
    "dsa_select": build_dsa_select,
}
SPARSE_CASES = {"nsa": nsa_cases, "dsa": dsa_cases, "dsa_select": dsa_select_cases}
OPERATORS = [*RECURRENCES, *_BUILD]


def cases_of(operator: str, dtype: torch.dtype, backend: str) -> Iterator[Case]:
    """The cases of one operator."""
    if operator == "attention":
        yield from _attention_cases(dtype, backend)
    elif operator in SPARSE_CASES:
        yield from SPARSE_CASES[operator](dtype)
    elif operator == "short_convolution":
        sizes: dict[str, Any] = {"D": 192, "W": 4}
        yield Case(operator, dtype, "odd length", batch=2, length=197, options=sizes)
        yield Case(operator, dtype, "packed", documents=DOCUMENTS, options=sizes)
        yield Case(operator, dtype, "packed, state", documents=(2, 70, 3, 0), state=True, options=sizes)
        yield Case(operator, dtype, "bias, state", batch=2, length=67, state=True, options={**sizes, "bias": True})
        yield Case(operator, dtype, "one token", batch=2, length=1, state=True, options={**sizes, "bias": True})
        yield Case(operator, dtype, "token by token", batch=2, length=9, state=True, decode=True, options=sizes)
        yield Case(operator, dtype, "no activation", length=5, options={**sizes, "activation": ""})
    elif operator == "gated_rms_norm":
        for what, batch, length, heads, width, activation in (
            ("odd length", 2, 197, 2, 192, "silu"),
            ("one token", 1, 1, 2, 192, "silu"),
            ("wide, single head", 2, 67, 1, 768, "sigmoid"),
        ):
            options = {"H": heads, "D": width, "activation": activation}
            yield Case(operator, dtype, what, batch=batch, length=length, options=options)
    else:
        yield from _recurrence_cases(operator, dtype)


def _recurrence_cases(operator: str, dtype: torch.dtype) -> Iterator[Case]:
    check = RECURRENCES[operator]
    wide, single = check.sizes, ONE_HEAD
    yield Case(operator, dtype, "odd length, state", wide, batch=2, length=197, state=True)
    yield Case(operator, dtype, "one token, state", wide, batch=2, length=1, state=True)
    yield Case(operator, dtype, "packed, state", wide, documents=DOCUMENTS, state=True)
    yield Case(operator, dtype, "packed, chunks found on the device", wide, documents=(63, 200), host_chunks=False)
    yield Case(operator, dtype, "single head, decay near 1", single, length=131, decay="near_one")
    yield Case(operator, dtype, "single head, decay near 0", single, length=131, decay="near_zero")
    yield Case(operator, dtype, "token by token", wide, batch=2, length=9, decode=True)
    # A stretch of rows under context parallelism: documents that lie elsewhere, and K more value channels.
    stretch = wide._replace(V=wide.K + wide.V)
    yield Case(operator, dtype, "packed, wide values", stretch, documents=(0, 0, 130, 0, 65, 0), state=True)
    if check.grouped_values:
        yield Case(operator, dtype, "grouped values, packed", Sizes(1, 2, 32, 32), documents=DOCUMENTS)


def _attention_cases(dtype: torch.dtype, backend: str) -> Iterator[Case]:
    heads, grouped, single = Sizes(2, 2, 64, 64), Sizes(4, 2, 64, 64), ONE_HEAD
    yield Case("attention", dtype, "odd length", heads, batch=2, length=197)
    yield Case("attention", dtype, "one token, single head", single, batch=2, length=1)
    yield Case("attention", dtype, "grouped values", grouped, batch=2, length=67)
    yield Case("attention", dtype, "token by token", grouped, batch=2, length=9, decode=True)
    if backend != "reference" and dtype not in (torch.bfloat16, torch.float16):
        return  # packed and windowed attention run in half precision on a GPU, and refuse anything else
    yield Case("attention", dtype, "window", heads, batch=2, length=197, options={"window": 33})
    yield Case("attention", dtype, "packed, grouped values", grouped, documents=DOCUMENTS)
    yield Case("attention", dtype, "packed, window", heads, documents=DOCUMENTS, options={"window": 33})
    yield Case("attention", dtype, "earlier keys", grouped, batch=2, length=197, options={"n_before": 100})
    earlier = {"n_before": 100, "window": 33}  # in the middle of a document
    yield Case("attention", dtype, "packed, window, earlier keys", heads, documents=DOCUMENTS, options=earlier)
