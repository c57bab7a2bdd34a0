"""The operators of sparse attention: how they are built, and their cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lt2titan.kernels.check.case import DOCUMENTS, ONE_HEAD, Built, Case, Packing
from lt2titan.kernels.check.other_operators import attention_inputs
from lt2titan.kernels.check.recurrences import Sizes
from lt2titan.kernels.check.sparse_definitions import (
    chosen_mass,
    dsa_definition,
    dsa_inputs,
    nsa_definition,
    nsa_probabilities,
    seen_rows,
)
from lt2titan.kernels.dsa import dsa_attention, dsa_indexer_kl, dsa_select
from lt2titan.kernels.dsa.reference import select_reference
from lt2titan.kernels.nsa import block_layout, compress, compressed_attention, select_blocks, selected_attention
from lt2titan.kernels.nsa.cached import cached_branches
from lt2titan.kernels.nsa.reference import choose_blocks

ROWS = (120, 14, 3, 60, 134, 30, 33)
"""Documents of two rows, as long; one begins before the 100th token of its row and ends after it."""


def build_nsa(case: Case, packing: Packing, backend: str) -> Built:
    """Both branches on the blocks that the definition would choose, side by side; and, of the blocks that the operator
    chooses, the probability that they catch. So two blocks that are equal but for rounding may change places, and a
    block that is chosen twice, too late or for nothing shows. Option n_before: tokens of which only keys are there."""
    options = {name: case.options[name] for name in ("block_size", "n_blocks")}
    n_before = case.options.get("n_before", 0)
    block_size, n_blocks = options.values()
    inputs = {name: x.to(case.dtype) for name, x in attention_inputs(packing.batch, packing.length, case.sizes).items()}
    documents = case.documents or (packing.length,)
    probabilities = nsa_probabilities(inputs["q"].double(), inputs["k"].double(), block_size, documents)
    positions = torch.cat([torch.arange(n) for n in documents])
    best = choose_blocks(probabilities, positions, block_size, n_blocks)

    def run(x: dict[str, Tensor]) -> Sequence[Tensor]:
        q, k, v = x.values()
        device = q.device
        if case.decode:  # one query at a time over a cache that holds the later tokens too
            k_cmp, v_cmp = (x.unflatten(1, (-1, block_size)).mean(dim=2) for x in (k, v))
            at = positions.to(device).expand(packing.batch, -1).split(1, dim=1)
            steps = [
                cached_branches(q_t, k, v, k_cmp, v_cmp, t, window=1, **options)
                for q_t, t in zip(q.split(1, 1), at, strict=True)
            ]
            return (torch.cat([torch.cat(branches[:2], dim=2) for branches in steps], dim=1),)
        cu_seqlens = None if packing.cu_seqlens is None else (packing.cu_seqlens - n_before).clamp(min=0)
        layout = block_layout(
            packing.batch,
            packing.length - n_before,
            block_size,
            cu_seqlens,
            device,
            length_k=packing.length,
            cu_seqlens_k=packing.cu_seqlens,
        )
        q, here = q[:, n_before:], slice(n_before, None)
        k_cmp, v_cmp = compress(k, layout, block_size), compress(v, layout, block_size)
        options_of_all = {"block_size": block_size, "backend": backend}
        compressed, lse = compressed_attention(q, k_cmp, v_cmp, layout, **options_of_all)
        blocks = select_blocks(q.detach(), k_cmp.detach(), lse, layout, n_blocks=n_blocks, **options_of_all)
        selected = selected_attention(q, k, v, best[:, here].to(device), layout, **options_of_all)
        mass = chosen_mass(blocks, probabilities[:, :, here].to(device), positions[here].to(device), block_size)
        return torch.cat([compressed, selected], dim=2), mass

    def define(x: dict[str, Tensor]) -> Sequence[Tensor]:
        y = nsa_definition(**x, blocks=best.to(x["q"].device), block_size=block_size, documents=documents)
        mass = chosen_mass(best, probabilities, positions, block_size).to(y.device)
        return (y,) if case.decode else (y[:, n_before:], mass[:, n_before:])

    return Built(inputs, run, define, ("output", "chosen_mass"))


def build_dsa(case: Case, packing: Packing, backend: str) -> Built:
    """Attention over what the operator itself selects, and the indexer's KL over that, or over all keys.

    Where scores round, another selection can be as good: the definition gets the operator's. That a selection is the
    right one is `build_dsa_select`'s matter.
    """
    options = dict(case.options)
    top_k, is_dense = options.pop("top_k"), options.pop("learn_all", False)
    n_rows, n_before = options.pop("rows", packing.batch), options.pop("n_before", 0)
    n_keys = packing.batch * packing.length // n_rows
    inputs = {name: x.to(case.dtype) for name, x in dsa_inputs(n_rows, n_keys, **options).items()}
    chosen: list[Tensor] = []

    def run(x: dict[str, Tensor]) -> Sequence[Tensor]:
        x = _later_queries(x, n_before)
        index, tokens, bounds = (x["index_q"], x["index_k"], x["w"]), (x["q"], x["k"], x["v"]), packing.cu_seqlens
        selection = dsa_select(*index, top_k=top_k, forced_first=True, cu_seqlens=bounds, backend=backend)
        o, lse = dsa_attention(*tokens, selection, backend=backend)
        learned = {"cu_seqlens": bounds} if is_dense else {"indices": selection, "lse": lse}
        chosen.append(selection)
        return o, dsa_indexer_kl(*index, x["q"], x["k"], **learned, backend=backend)

    def define(x: dict[str, Tensor]) -> Sequence[Tensor]:
        seen = seen_rows(n_rows, n_keys, n_before, case.documents, x["q"].device) if is_dense else None
        return dsa_definition(**_later_queries(x, n_before), indices=chosen[0], seen=seen)

    return Built(inputs, run, define)


def _later_queries(inputs: dict[str, Tensor], n_before: int) -> dict[str, Tensor]:
    """All keys, and the queries of tokens after the first ``n_before`` of each row: a stretch of a longer row."""
    return {name: x[:, n_before:] if name in ("index_q", "w", "q") else x for name, x in inputs.items()}


def build_dsa_select(case: Case, packing: Packing, backend: str) -> Built:
    """Selections by scores that are exact in any dtype, and mostly tied: those of small whole numbers."""
    options = case.options
    n_rows, n_before = options.get("rows", packing.batch), options.get("n_before", 0)
    n_keys = packing.batch * packing.length // n_rows
    inputs = dsa_inputs(n_rows, n_keys, H=1, HV=1, K=1, J=options["J"], E=options["E"])
    index = {name: inputs[name].sign() * (inputs[name].abs() > 1) for name in ("index_q", "index_k")}
    index["w"] = inputs["w"].sign()
    top_k, local = options["top_k"], options["local"]

    def run(x: dict[str, Tensor]) -> Sequence[Tensor]:
        selection = dsa_select(
            **_later_queries(x, n_before),
            top_k=top_k,
            forced_first=local > 0,
            forced_local=local,
            cu_seqlens=packing.cu_seqlens,
            backend=backend,
        )
        return (selection.double(),)

    def define(x: dict[str, Tensor]) -> Sequence[Tensor]:
        chosen = select_reference(x["index_q"], x["index_k"], x["w"], packing.cu_seqlens, top_k, local > 0, local)
        return (chosen[:, n_before:].double(),)

    return Built({name: x.to(case.dtype) for name, x in index.items()}, run, define)


def nsa_cases(dtype: torch.dtype) -> Iterator[Case]:
    sizes, grouped = Sizes(16, 1, 128, 128), Sizes(6, 2, 40, 40)
    options, few = {"block_size": 64, "n_blocks": 16}, {"block_size": 16, "n_blocks": 4}
    yield Case("nsa", dtype, "odd length", sizes, batch=1, length=1201, options=options)
    yield Case("nsa", dtype, "few blocks, odd heads", grouped, batch=2, length=197, options=few)
    yield Case("nsa", dtype, "one token, single head", ONE_HEAD, batch=2, length=1, options=few)
    yield Case("nsa", dtype, "packed", sizes, documents=DOCUMENTS, options={"block_size": 32, "n_blocks": 3})
    yield Case("nsa", dtype, "packed, odd heads", grouped, documents=DOCUMENTS, options=few)
    yield Case("nsa", dtype, "earlier keys", sizes, batch=2, length=1201, options=options | {"n_before": 601})
    yield Case("nsa", dtype, "packed, earlier keys", grouped, documents=DOCUMENTS, options=few | {"n_before": 100})
    yield Case("nsa", dtype, "token by token", grouped, batch=2, length=48, decode=True, options=few)


def dsa_cases(dtype: torch.dtype) -> Iterator[Case]:
    operator = "dsa"
    one_key: dict[str, Any] = {"H": 16, "HV": 1, "K": 128, "J": 8, "E": 64}
    grouped: dict[str, Any] = {"H": 6, "HV": 2, "K": 48, "J": 3, "E": 24}
    yield Case(operator, dtype, "one key head", batch=2, length=197, options={**one_key, "top_k": 96})
    yield Case(operator, dtype, "packed, odd widths", documents=DOCUMENTS, options={**grouped, "top_k": 40})
    yield Case(operator, dtype, "one token", length=1, decode=True, options={**grouped, "top_k": 4})
    yield Case(operator, dtype, "all keys", length=197, options={**one_key, "top_k": 256})
    learn_all = {"top_k": 40, "learn_all": True}
    yield Case(operator, dtype, "KL over all keys", batch=2, length=197, options=one_key | learn_all)
    yield Case(operator, dtype, "KL over all keys, packed", documents=DOCUMENTS, options=grouped | learn_all)
    for what, learned in (("", {"top_k": 40}), (", KL over all keys", learn_all)):
        later = {**grouped, **learned, "n_before": 100}
        yield Case(operator, dtype, f"earlier keys{what}", batch=2, length=197, options=later)
        yield Case(operator, dtype, f"packed rows, earlier keys{what}", documents=ROWS, options=later | {"rows": 2})


def dsa_select_cases(dtype: torch.dtype) -> Iterator[Case]:
    operator = "dsa_select"
    wide, odd = {"J": 8, "E": 64}, {"J": 3, "E": 24}
    for what, top_k, local in (("ties", 40, 0), ("ties, forced tokens", 70, 9)):
        options = {"top_k": top_k, "local": local}
        yield Case(operator, dtype, what, batch=2, length=397, decode=True, options=options | wide)
        yield Case(operator, dtype, f"{what}, packed", documents=DOCUMENTS, decode=True, options=options | odd)
        later = options | odd | {"n_before": 100}
        yield Case(operator, dtype, f"{what}, earlier keys", batch=2, length=397, decode=True, options=later)
        of_rows = later | {"rows": 2}
        yield Case(operator, dtype, f"{what}, packed rows, earlier keys", documents=ROWS, decode=True, options=of_rows)
    options = {"top_k": 4096, "local": 64}  # of rows too long to be searched at once, some keys more than can be
    yield Case(operator, dtype, "one token", length=1, decode=True, options={"top_k": 4, "local": 2} | odd)
    if dtype == torch.bfloat16:  # seconds on a CPU
        yield Case(operator, dtype, "ties, long", length=9000, decode=True, options=options | wide)
