"""What is checked: every operator over the shapes that tend to break kernels, each case against fp64 on its own inputs.

A case draws inputs in fp64, rounds them to its dtype, runs the operator forward and backward through a random
projection of all its outputs, and compares with the definition on the same rounded inputs in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lt2titan.kernels.attention import attention, masked_attention
from lt2titan.kernels.check.other_operators import (
    attention_definition,
    attention_inputs,
    chosen_mass,
    convolution_inputs,
    dsa_definition,
    dsa_inputs,
    norm_inputs,
    nsa_definition,
    nsa_probabilities,
)
from lt2titan.kernels.check.recurrences import RECURRENCES, Decay, Draw, Sizes
from lt2titan.kernels.dsa import dsa_attention, dsa_indexer_kl, dsa_select
from lt2titan.kernels.dsa.reference import select_reference
from lt2titan.kernels.gated_rms_norm import gated_rms_norm
from lt2titan.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from lt2titan.kernels.nsa import block_layout, compress, compressed_attention, select_blocks, selected_attention
from lt2titan.kernels.nsa.cached import cached_branches
from lt2titan.kernels.nsa.reference import choose_blocks
from lt2titan.kernels.packing import make_chunk_indices
from lt2titan.kernels.recurrence import state_dtype
from lt2titan.kernels.short_convolution import short_convolution
from lt2titan.kernels.short_convolution.reference import short_convolution_reference

PRECISE = ("g", "beta")
"""Per-token inputs that mixers compute and keep in fp32."""

ONE_HEAD = Sizes(1, 1, 32, 32)

FLOOR = 1e-2
"""Root mean square below which an error counts absolutely: operands are of order 1, so that much less is noise."""


@dataclass(frozen=True)
class Case:
    """`documents` are lengths packed in one row; otherwise there are `batch` rows of `length` tokens."""

    operator: str
    dtype: torch.dtype
    what: str = ""
    """The shape's point, for the table."""
    sizes: Sizes = ONE_HEAD
    batch: int = 1
    length: int = 0
    documents: tuple[int, ...] = ()
    decay: Decay = "mixed"
    state: bool = False
    """With initial and final state."""
    decode: bool = False
    """Without gradients, one token after another."""
    host_chunks: bool = True
    """Pass chunk_indices made on the host, as the data loader does."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the operators that are not recurrences."""

    @property
    def name(self) -> str:
        """Operator, dtype and shape in one line."""
        return f"{self.operator}, {self.dtype_name}, {self.what}, {self.shape}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape(self) -> str:
        """Tokens, then heads and widths."""
        tokens = "+".join(map(str, self.documents)) if self.documents else f"{self.batch}x{self.length}"
        sizes = (self.sizes._asdict() if self.sizes != ONE_HEAD or not self.options else {}) | self.options
        return " ".join([tokens, *(f"{key}={value}" for key, value in sizes.items())])


@dataclass(frozen=True)
class Built:
    """Named inputs, and two functions from them to the same outputs: the operator and its definition."""

    inputs: dict[str, Tensor]
    run: Callable[[dict[str, Tensor]], Sequence[Tensor]]
    define: Callable[[dict[str, Tensor]], Sequence[Tensor]]
    names: tuple[str, ...] = ("output", "final_state")
    """Of the outputs; of fewer, the first."""


def errors_of(case: Case, device: torch.device | str, backend: str) -> dict[str, float]:
    """Run a case; return the relative error ||got - expected|| / ||expected|| of every output and gradient."""
    packing = _Packing(case, torch.device(device))
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


class _Packing:
    """Rows, tokens, sequences, and the boundaries if documents are packed."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.cu_seqlens: Tensor | None = None
        self.chunk_indices: Tensor | None = None
        self.batch, self.length, self.n_sequences = case.batch, case.length, case.batch
        self.max_seqlen = case.length
        if case.documents:
            bounds = torch.tensor([0, *accumulate(case.documents)], dtype=torch.int32)
            self.batch, self.length, self.n_sequences = 1, int(bounds[-1]), len(case.documents)
            self.max_seqlen = max(case.documents)
            self.cu_seqlens = bounds.to(device)
            if case.host_chunks:
                self.chunk_indices = make_chunk_indices(bounds).to(device)


def _recurrence(case: Case, packing: _Packing, backend: str) -> Built:
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


def _short_convolution(case: Case, packing: _Packing, backend: str) -> Built:
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


def _gated_rms_norm(case: Case, packing: _Packing, backend: str) -> Built:
    inputs = norm_inputs(packing.batch, packing.length, case.options["H"], case.options["D"])
    activation = case.options["activation"]
    return Built(
        {name: x.to(case.dtype) for name, x in inputs.items()},
        lambda x: (gated_rms_norm(**x, eps=1e-5, activation=activation, backend=backend),),
        lambda x: (gated_rms_norm_reference(x["x"], x["gate"], x["weight"], 1e-5, activation),),
    )


def _attention(case: Case, packing: _Packing, backend: str) -> Built:
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


def _nsa(case: Case, packing: _Packing, backend: str) -> Built:
    """Both branches on the blocks that the definition would choose, side by side; and, of the blocks that the operator
    chooses, the probability that they catch. So two blocks that are equal but for rounding may change places, and a
    block that is chosen twice, too late or for nothing shows."""
    options = {name: case.options[name] for name in ("block_size", "n_blocks")}
    block_size, n_blocks = options.values()
    inputs = {name: x.to(case.dtype) for name, x in attention_inputs(packing.batch, packing.length, case.sizes).items()}
    documents = case.documents or (packing.length,)
    probabilities = nsa_probabilities(inputs["q"].double(), inputs["k"].double(), block_size, documents)
    positions = torch.cat([torch.arange(n) for n in documents])
    best = choose_blocks(probabilities, positions, block_size, n_blocks)

    def run(x: dict[str, Tensor]) -> Sequence[Tensor]:
        q, k, v = x.values()
        device = q.device
        layout = block_layout(packing.batch, packing.length, block_size, packing.cu_seqlens, device)
        if case.decode:  # one query at a time over a cache that holds the later tokens too
            k_cmp, v_cmp = (x.unflatten(1, (-1, block_size)).mean(dim=2) for x in (k, v))
            at = positions.to(device).expand(packing.batch, -1).split(1, dim=1)
            steps = [
                cached_branches(q_t, k, v, k_cmp, v_cmp, t, window=1, **options)
                for q_t, t in zip(q.split(1, 1), at, strict=True)
            ]
            return (torch.cat([torch.cat(branches[:2], dim=2) for branches in steps], dim=1),)
        k_cmp, v_cmp = compress(k, layout, block_size), compress(v, layout, block_size)
        options_of_all = {"block_size": block_size, "backend": backend}
        compressed, lse = compressed_attention(q, k_cmp, v_cmp, layout, **options_of_all)
        blocks = select_blocks(q.detach(), k_cmp.detach(), lse, layout, n_blocks=n_blocks, **options_of_all)
        selected = selected_attention(q, k, v, best.to(device), layout, **options_of_all)
        mass = chosen_mass(blocks, probabilities.to(device), positions.to(device), block_size)
        return torch.cat([compressed, selected], dim=2), mass

    def define(x: dict[str, Tensor]) -> Sequence[Tensor]:
        y = nsa_definition(**x, blocks=best.to(x["q"].device), block_size=block_size, documents=documents)
        return (y,) if case.decode else (y, chosen_mass(best, probabilities, positions, block_size).to(y.device))

    return Built(inputs, run, define, ("output", "chosen_mass"))


def _dsa(case: Case, packing: _Packing, backend: str) -> Built:
    """Attention over what the operator itself selects, and the indexer's KL over that, or over all keys.

    Where scores round, another selection can be as good: the definition gets the operator's. That a selection is the
    right one is `_dsa_select`'s matter.
    """
    options = dict(case.options)
    top_k, is_dense = options.pop("top_k"), options.pop("learn_all", False)
    inputs = {name: x.to(case.dtype) for name, x in dsa_inputs(packing.batch, packing.length, **options).items()}
    chosen: list[Tensor] = []

    def run(x: dict[str, Tensor]) -> Sequence[Tensor]:
        index, tokens, bounds = (x["index_q"], x["index_k"], x["w"]), (x["q"], x["k"], x["v"]), packing.cu_seqlens
        selection = dsa_select(*index, top_k=top_k, forced_first=True, cu_seqlens=bounds, backend=backend)
        o, lse = dsa_attention(*tokens, selection, backend=backend)
        learned = {"cu_seqlens": bounds} if is_dense else {"indices": selection, "lse": lse}
        chosen.append(selection)
        return o, dsa_indexer_kl(*index, x["q"], x["k"], **learned, backend=backend)

    def define(x: dict[str, Tensor]) -> Sequence[Tensor]:
        return dsa_definition(**x, indices=chosen[0], documents=case.documents, is_dense=is_dense)

    return Built(inputs, run, define)


def _dsa_select(case: Case, packing: _Packing, backend: str) -> Built:
    """Selections by scores that are exact in any dtype, and mostly tied: those of small whole numbers."""
    options = case.options
    inputs = dsa_inputs(packing.batch, packing.length, H=1, HV=1, K=1, J=options["J"], E=options["E"])
    index = {name: inputs[name].sign() * (inputs[name].abs() > 1) for name in ("index_q", "index_k")}
    index["w"] = inputs["w"].sign()
    top_k, local = options["top_k"], options["local"]

    def run(x: dict[str, Tensor]) -> Sequence[Tensor]:
        selection = dsa_select(
            x["index_q"],
            x["index_k"],
            x["w"],
            top_k=top_k,
            forced_first=local > 0,
            forced_local=local,
            cu_seqlens=packing.cu_seqlens,
            backend=backend,
        )
        return (selection.double(),)

    def define(x: dict[str, Tensor]) -> Sequence[Tensor]:
        return (
            select_reference(x["index_q"], x["index_k"], x["w"], packing.cu_seqlens, top_k, local > 0, local).double(),
        )

    return Built({name: x.to(case.dtype) for name, x in index.items()}, run, define)


_BUILD: dict[str, Callable[[Case, _Packing, str], Built]] = {
    "attention": _attention,
    "nsa": _nsa,
    "short_convolution": _short_convolution,
    "gated_rms_norm": _gated_rms_norm,
    "dsa": _dsa,
    "dsa_select": _dsa_select,
}
OPERATORS = [*RECURRENCES, *_BUILD]
DOCUMENTS = (1, 64, 130, 7, 65, 1, 0, 0)


def cases_of(operator: str, dtype: torch.dtype, backend: str) -> Iterator[Case]:
    """The cases of one operator."""
    if operator == "attention":
        yield from _attention_cases(dtype, backend)
    elif operator == "nsa":
        yield from _nsa_cases(dtype)
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
    elif operator == "dsa":
        one_key: dict[str, Any] = {"H": 16, "HV": 1, "K": 128, "J": 8, "E": 64}
        grouped: dict[str, Any] = {"H": 6, "HV": 2, "K": 48, "J": 3, "E": 24}
        yield Case(operator, dtype, "one key head", batch=2, length=197, options={**one_key, "top_k": 96})
        yield Case(operator, dtype, "packed, odd widths", documents=DOCUMENTS, options={**grouped, "top_k": 40})
        yield Case(operator, dtype, "one token", length=1, decode=True, options={**grouped, "top_k": 4})
        yield Case(operator, dtype, "all keys", length=197, options={**one_key, "top_k": 256})
        learn_all = {"top_k": 40, "learn_all": True}
        yield Case(operator, dtype, "KL over all keys", batch=2, length=197, options=one_key | learn_all)
        yield Case(operator, dtype, "KL over all keys, packed", documents=DOCUMENTS, options=grouped | learn_all)
    elif operator == "dsa_select":
        wide, odd = {"J": 8, "E": 64}, {"J": 3, "E": 24}
        for what, top_k, local in (("ties", 40, 0), ("ties, forced tokens", 70, 9)):
            options = {"top_k": top_k, "local": local}
            yield Case(operator, dtype, what, batch=2, length=397, decode=True, options=options | wide)
            yield Case(operator, dtype, f"{what}, packed", documents=DOCUMENTS, decode=True, options=options | odd)
        options = {"top_k": 2048, "local": 64}
        yield Case(operator, dtype, "one token", length=1, decode=True, options={"top_k": 4, "local": 2} | odd)
        yield Case(operator, dtype, "ties, long", length=5000, decode=True, options=options | wide)
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


def _nsa_cases(dtype: torch.dtype) -> Iterator[Case]:
    sizes, grouped = Sizes(16, 1, 128, 128), Sizes(6, 2, 40, 40)
    options, few = {"block_size": 64, "n_blocks": 16}, {"block_size": 16, "n_blocks": 4}
    yield Case("nsa", dtype, "odd length", sizes, batch=1, length=1201, options=options)
    yield Case("nsa", dtype, "few blocks, odd heads", grouped, batch=2, length=197, options=few)
    yield Case("nsa", dtype, "one token, single head", ONE_HEAD, batch=2, length=1, options=few)
    yield Case("nsa", dtype, "packed", sizes, documents=DOCUMENTS, options={"block_size": 32, "n_blocks": 3})
    yield Case("nsa", dtype, "packed, odd heads", grouped, documents=DOCUMENTS, options=few)
    yield Case("nsa", dtype, "token by token", grouped, batch=2, length=48, decode=True, options=few)
