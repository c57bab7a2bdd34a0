"""Generation state against the full forward pass of each sequence alone: the only truth there is for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from model_zoo import ZOO, build
from torch import Tensor

from lt2titan.model.config import ModelConfig
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers import full
from lt2titan.model.state import DecodeState, allocate

kinds = pytest.mark.parametrize("kind", ZOO)
loops = pytest.mark.parametrize("n_loops", [1, 2, 4])


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


def looped(kind: str, n_loops: int) -> ModelConfig:
    config = ZOO[kind]
    windows = (config.loop.windows * n_loops)[:n_loops]
    return replace(config, n_loops=n_loops, loop=replace(config.loop, windows=windows))


def random_tokens(n_rows: int, length: int, seed: int = 4) -> Tensor:
    return torch.randint(0, 19, (n_rows, length), generator=torch.Generator().manual_seed(seed))


def empty(model: LT2, n_rows: int, length: int) -> DecodeState:
    return allocate(model, n_rows, length, model.embedding.weight.dtype, "cpu")


def packed(model: LT2, documents: Sequence[Tensor], state: DecodeState) -> list[Tensor]:
    """Logits of each of ``documents``, of which the n-th continues sequence n."""
    lengths = torch.tensor([len(document) for document in documents])
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    logits = model(torch.cat(list(documents))[None], state=state, cu_seqlens=cu_seqlens)
    return list(logits[0].split(lengths.tolist()))


def check(logits: Tensor, expected: Tensor) -> None:
    """Every logit within 1e-9 in fp64; in fp32 their error as a whole within 1e-4 (single logits of a deep loop are as
    far from fp64 themselves, however computed)."""
    if expected.dtype == torch.float64:
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    else:
        assert (logits - expected).norm() <= 1e-4 * expected.norm()


def check_splits(model: LT2, splits: list[int]) -> None:
    tokens = random_tokens(2, sum(splits))
    state = empty(model, 2, sum(splits))
    pieces = [model(piece, state=state) for piece in tokens.split(splits, dim=1)]
    check(torch.cat(pieces, dim=1), model(tokens))
    assert state.lengths.tolist() == [sum(splits)] * 2


@loops
@kinds
def test_prefill_and_decode_equal_the_full_forward(kind: str, n_loops: int) -> None:
    """A prefill longer than the windows, single tokens until they have wrapped, a chunk longer than they are, more."""
    check_splits(build(looped(kind, n_loops)), [7, 1, 1, 1, 8, 1])


@kinds
def test_decoding_from_the_first_token_equals_the_full_forward_in_fp32(kind: str) -> None:
    check_splits(build(ZOO[kind]).float(), [1] * 9)


@pytest.mark.wide
@loops
@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_every_split_equals_the_full_forward(kind: str, n_loops: int, dtype: torch.dtype) -> None:
    model = build(looped(kind, n_loops)).to(dtype)
    check_splits(model, [1] * 40)
    for prefill in range(1, 20, 1 if dtype == torch.float64 else 6):
        check_splits(model, [prefill, 1, 20 - prefill, 1])
    check_splits(model, [70, 1, 5, 64, 1])


@kinds
def test_a_batch_of_unequal_prompts_equals_each_alone(kind: str) -> None:
    """Packed prefill in two parts (a sequence may get nothing), then token by token, each at its own position."""
    model = build(ZOO[kind])
    rows = random_tokens(4, 21)
    parts = [[7, 0, 2, 1], [8, 1, 0, 11]]  # tokens for each sequence: beyond the windows, none, few
    state = empty(model, 4, 21)
    got: list[list[Tensor]] = [[], [], [], []]
    n_held = [0] * 4
    for part in parts:
        documents = [row[held : held + n] for row, held, n in zip(rows, n_held, part, strict=True)]
        for pieces, logits in zip(got, packed(model, documents, state), strict=True):
            pieces.append(logits)
        n_held = [held + n for held, n in zip(n_held, part, strict=True)]
    for n_new in (1, 1, 3, 1):  # dense rows, one of them a chunk
        places = torch.tensor(n_held)[:, None] + torch.arange(n_new)
        for pieces, logits in zip(got, model(rows.gather(1, places), state=state), strict=True):
            pieces.append(logits)
        n_held = [held + n_new for held in n_held]
    assert state.lengths.tolist() == n_held == [21, 7, 8, 18]
    for row, held, pieces in zip(rows, n_held, got, strict=True):
        check(torch.cat(pieces), model(row[None, :held])[0])


@kinds
def test_selected_and_reset_sequences_equal_fresh_ones(kind: str) -> None:
    model = build(ZOO[kind])
    prompts = [row[:n] for row, n in zip(random_tokens(3, 9), (9, 2, 6), strict=True)]
    state = empty(model, 3, 20)
    packed(model, prompts, state)
    slots = [slot for loop in state.slots for slot in loop]
    storage = {t.data_ptr() for slot in slots for t in slot.values()} | {state.lengths.data_ptr()}

    def check_goes_on(texts: list[Tensor], seed: int) -> list[Tensor]:
        new = random_tokens(len(texts), 3, seed)
        pieces = torch.cat([model(new[:, :1], state=state), model(new[:, 1:], state=state)], dim=1)
        texts = [torch.cat([text, row]) for text, row in zip(texts, new, strict=True)]
        for text, logits in zip(texts, pieces, strict=True):
            check(logits, model(text[None])[0, -3:])
        return texts

    state.select([2, 0, 2])  # in place: the second candidate wins twice
    texts = check_goes_on([prompts[2], prompts[0], prompts[2]], seed=5)
    state.reset([1])
    texts = check_goes_on([texts[0], texts[1][:0], texts[2]], seed=6)
    assert {t.data_ptr() for slot in slots for t in slot.values()} | {state.lengths.data_ptr()} == storage
    state.select([1, 0])
    texts = check_goes_on([texts[1], texts[0]], seed=7)
    state.select([0, 1, 1, 0])
    check_goes_on([texts[i] for i in (0, 1, 1, 0)], seed=8)
    state.reset()
    assert state.lengths.tolist() == [0] * 4
    check_goes_on([texts[0][:0]] * 4, seed=9)
    fresh = empty(model, 4, 20)
    state.reset()
    for loop, fresh_loop in zip(state.slots, fresh.slots, strict=True):
        for slot, fresh_slot in zip(loop, fresh_loop, strict=True):
            assert slot.keys() == fresh_slot.keys()
            assert all(torch.equal(slot[name], fresh_slot[name]) for name in slot)


@kinds
def test_one_sequence_never_reaches_another(kind: str) -> None:
    """Bitwise: what a neighbour reads, and how it goes on, changes nothing; it does change its own logits."""
    model = build(ZOO[kind])
    prompt, neighbour = random_tokens(2, 8)
    outcomes = []
    for other in (neighbour, (neighbour + 1) % 19):
        state = empty(model, 2, 10)
        first = packed(model, [prompt, other], state)
        then = model(torch.stack([prompt[:1], other[:1]]), state=state)
        outcomes.append((torch.cat([first[0], then[0]]), torch.cat([first[1], then[1]])))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert not torch.equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("kind", ["full", "window", "gdn+full, window per loop"])
def test_queries_in_blocks_see_what_they_would_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "QUERY_BLOCK", 4)
    model = build(ZOO[kind])
    check_splits(model, [13, 1, 14])
    rows = random_tokens(2, 20)
    state = empty(model, 2, 20)
    packed(model, [rows[0, :3], rows[1, :9]], state)
    got = packed(model, [rows[0, 3:], rows[1, 9:]], state)
    expected = model(rows)
    check(got[0], expected[0, 3:])
    check(got[1], expected[1, 9:])


def test_logits_of_chosen_tokens_are_those_of_all() -> None:
    model = build(ZOO["gdn+full"])
    tokens = random_tokens(2, 5)
    chosen = model(tokens, logits_at=torch.tensor([9, 4]))
    check(chosen, model(tokens)[[1, 0], [4, 4]])


def test_a_full_decode_state_says_so_and_stays_as_it_was() -> None:
    model = build(ZOO["gdn+full"])
    rows = random_tokens(2, 6)
    state = empty(model, 2, 6)
    packed(model, [rows[0, :4], rows[1, :2]], state)
    with pytest.raises(ValueError, match=r"allocated for 6 tokens and cannot hold 7 \(sequence 0\)"):
        model(torch.zeros(2, 3, dtype=torch.long), state=state)
    with pytest.raises(ValueError, match=r"cannot hold 8 \(sequence 1\)"):
        packed(model, [rows[0, :2], rows[1, :6]], state)
    assert state.lengths.tolist() == [4, 2]
    got = packed(model, [rows[0, 4:], rows[1, 2:]], state)
    check(got[1], model(rows)[1, 2:])
    state.reset()
    check(model(rows, state=state), model(rows))


def test_calls_that_do_not_fit_the_state_are_refused() -> None:
    model = build(ZOO["gdn+full"])
    tokens, state = random_tokens(2, 3), empty(model, 2, 9)
    bounds = torch.tensor([0, 1, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="3 rows of tokens cannot continue the 2 sequences"):
        model(random_tokens(3, 1), state=state)
    with pytest.raises(ValueError, match="bounds 3 documents and the decode state holds 2 sequences"):
        model(tokens, state=state, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens"):
        model(tokens, state=state, cu_seqlens=bounds[:3])
    with pytest.raises(ValueError, match="positions cannot be given"):
        model(tokens, state=state, positions=torch.arange(3).expand(2, 3))
    with pytest.raises(ValueError, match="no tokens to continue"):
        model(tokens[:, :0], state=state)
    with pytest.raises(ValueError, match="slots for 3 loops of 3 layers and the model visits 2 of 3"):
        build(looped("gdn+full", 2))(tokens, state=state)
    with torch.enable_grad(), pytest.raises(ValueError, match="no_grad"):
        model(tokens, state=state)
    with pytest.raises(ValueError, match="sequences 0 to 1 and has no \\[2\\]"):
        state.select([0, 2])
    with pytest.raises(ValueError, match="has no \\[-1\\]"):
        state.reset([-1])
    with pytest.raises(ValueError, match="at least one sequence"):
        state.select([])
    with pytest.raises(ValueError, match="needs sequences and tokens"):
        empty(model, 0, 9)
    assert state.lengths.tolist() == [0, 0] and state.batch_size == 2
    check(model(tokens, state=state), model(tokens))


def test_the_size_of_a_state_is_that_of_its_tensors() -> None:
    """Keys, values and positions of one full layer; recurrent state in fp32 and three taps of two GDN layers."""
    config = ZOO["gdn+full"]
    state = allocate(build(config), 3, 50, torch.bfloat16, "meta")
    width = config.dim // config.mixers.full.n_heads
    softmax = 50 * (2 * config.mixers.full.n_kv_heads * width * 2 + 8)
    key_dim, value_dim = 12, 24  # 0.75 and 1.5 times 16, in 2 and 4 heads
    gdn = 4 * (key_dim // 2) * (value_dim // 4) * 4 + 3 * (2 * key_dim + value_dim) * 2
    assert state.n_bytes == 3 * config.n_loops * (softmax + 2 * gdn)
