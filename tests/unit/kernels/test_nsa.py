"""Native sparse attention's branches: against fla's naive functions, dense softmax, and what they promise.

kernels/check compares values and gradients with masks written out; tests/unit/kernels/test_fla_interpreter.py has the
Triton kernels.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from nsa_stretches import BOUNDS as BOUNDS_OF_ROWS
from nsa_stretches import LENGTH, ROWS, check_stretches, stretch_layout
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lt2titan.kernels.attention import attention
from lt2titan.kernels.check.cases import cases_of, errors_of
from lt2titan.kernels.nsa import (
    BlockLayout,
    _compressed,
    _select,
    _selected,
    block_layout,
    compress,
    compressed_attention,
    gpu_misfit,
    reference,
    select_blocks,
    selected_attention,
)

CPU = torch.device("cpu")
BOUNDS = [0, 1, 65, 65, 195, 202, 203]
SIZE, N_BLOCKS = 16, 4


def draw(length: int, n_heads: int = 6, n_kv_heads: int = 2, width: int = 10, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (n_heads, n_kv_heads, n_kv_heads)
    return [torch.randn(batch, length, n, width, dtype=torch.float64, generator=generator) for n in heads]


def packed_layout() -> BlockLayout:
    return block_layout(1, BOUNDS[-1], SIZE, torch.tensor([*BOUNDS, BOUNDS[-1]], dtype=torch.int32), CPU)


def chosen_blocks(q: Tensor, k: Tensor, layout: BlockLayout, n_blocks: int = N_BLOCKS) -> Tensor:
    k_cmp = compress(k, layout, SIZE)
    _, lse = compressed_attention(q, k_cmp, k_cmp, layout, block_size=SIZE, backend="reference")
    return select_blocks(q, k_cmp, lse, layout, block_size=SIZE, n_blocks=n_blocks, backend="reference")


def test_blocks_start_anew_with_every_document() -> None:
    layout = packed_layout()
    starts = [start for a, b in pairwise(BOUNDS) for start in range(a, b, SIZE)]
    n_empty = len(layout.block_start) - len(starts)
    assert layout.block_start.tolist() == starts + [BOUNDS[-1]] * n_empty
    ends = [next(b for b in BOUNDS if b > start) for start in starts]
    assert layout.block_stop.tolist() == ends + [BOUNDS[-1]] * n_empty
    for token in range(BOUNDS[-1]):
        start = max(b for b in BOUNDS if b <= token)
        assert layout.query_start[token] == start and starts[int(layout.query_block[token])] == start
        assert layout.query_position[token] == token - start
        assert starts[int(layout.key_block[token])] == token - (token - start) % SIZE


@pytest.mark.parametrize("edges", [(0, 66), (33, 66), (66, 99), (99, 132), (0, 132)])
@pytest.mark.parametrize("packed", [False, True])
def test_queries_that_lie_apart_from_keys(edges: tuple[int, int], packed: bool) -> None:
    """Every field by looking for it, token by token."""
    first, last = edges
    layout = stretch_layout(first, last, packed)
    bounds = BOUNDS_OF_ROWS if packed else [0, LENGTH, 2 * LENGTH]
    tokens = [row * LENGTH + i for row in range(ROWS) for i in range(last)]  # of each key, and of each query
    queries = [row * LENGTH + i for row in range(ROWS) for i in range(first, last)]
    start_of = {token: max(b for b in bounds if b <= token) for token in tokens}
    blocks: list[list[int]] = []  # of tokens
    for token in tokens:
        if (token - start_of[token]) % SIZE == 0:
            blocks.append([])
        blocks[-1].append(token)
    for query, token in enumerate(queries):
        start = start_of[token]
        assert layout.query_position[query] == token - start
        assert tokens[int(layout.query_start[query])] == start
        assert blocks[int(layout.query_block[query])][0] == start
    for key, token in enumerate(tokens):
        assert token in blocks[int(layout.key_block[key])]
    n_blocks = len(blocks)
    assert [tokens[int(i)] for i in layout.block_start[:n_blocks]] == [block[0] for block in blocks]
    for i, block in enumerate(blocks):
        start = start_of[block[0]]
        of_document = [token for token in tokens if start_of[token] == start]
        assert tokens[int(layout.block_stop[i]) - 1] == of_document[-1]
        seen = [t for t in of_document if t >= block[0] + SIZE - 1 and t in queries]
        assert queries[layout.seen_from[i] : layout.seen_until[i]] == seen
        for token in set(of_document) & set(queries):
            assert token - block[0] == queries.index(token) - int(layout.block_query[i])
    for empty, place in zip(layout[6:], [len(tokens)] * 2 + [len(queries)] * 3, strict=True):
        assert (empty[n_blocks:] == place).all()


@pytest.mark.parametrize("n_stretches", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_stretches_of_rows_are_the_rows(n_stretches: int, packed: bool) -> None:
    check_stretches(torch.float64, "reference", n_stretches, packed, tolerance=1e-13)


def test_fla_defines_the_same_functions() -> None:
    naive = pytest.importorskip("fla.ops.nsa.naive")
    q, k, v = draw(BOUNDS[-1], n_heads=32, n_kv_heads=2, width=16)
    layout = packed_layout()
    k_cmp, v_cmp = compress(k, layout, SIZE), compress(v, layout, SIZE)
    o, lse = compressed_attention(q, k_cmp, v_cmp, layout, block_size=SIZE, backend="reference")
    blocks = chosen_blocks(q, k, layout)
    selected = selected_attention(q, k, v, blocks, layout, block_size=SIZE, backend="reference")
    bounds = torch.tensor(BOUNDS)[[0, 1, 2, 4, 5, 6]]  # fla has no empty documents
    scale = 16**-0.5
    theirs = naive.naive_nsa_compression(q, k_cmp[None], v_cmp[None], SIZE, scale, bounds)
    torch.testing.assert_close(o, theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.float(), theirs[1], atol=1e-5, rtol=1e-5)
    their_blocks = naive.naive_nsa_topk(q, k_cmp[None], N_BLOCKS, SIZE, scale, bounds)
    none = 1 << 20
    rising = their_blocks.where(their_blocks >= 0, none).sort(dim=-1).values
    assert torch.equal(blocks.long(), rising.where(rising < none, -1))
    theirs = naive.naive_nsa_selection(q, k, v, their_blocks, SIZE, scale, bounds)
    torch.testing.assert_close(selected, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [*cases_of("nsa", torch.float64, "reference")], ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_masks_written_out(case) -> None:
    assert max(errors_of(case, "cpu", "reference").values()) < 1e-12


def test_with_blocks_for_all_it_is_full_attention() -> None:
    q, k, v = (x.requires_grad_() for x in draw(75, batch=2))
    layout = block_layout(2, 75, SIZE, None, CPU)
    blocks = chosen_blocks(q, k, layout, n_blocks=5)
    y = selected_attention(q, k, v, blocks, layout, block_size=SIZE, backend="reference")
    expected = attention(q, k, v, backend="reference")
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    got, want = (torch.autograd.grad(out, [q, k, v], weights) for out in (y, expected))
    torch.testing.assert_close(got, want)


def test_equal_blocks_are_taken_from_the_oldest() -> None:
    q, k = torch.ones(1, 160, 6, 10), torch.ones(1, 160, 2, 10)
    q[:, :, 3:] = -1.0  # the group of the second key head
    k[:, 80:96] *= 2.0  # block 5: better for the first, worse for the second; all others are equal
    blocks = chosen_blocks(q, k, block_layout(1, 160, SIZE, None, CPU))
    assert blocks[0, 159].tolist() == [[0, 5, 8, 9], [0, 1, 8, 9]]
    assert blocks[0, 79].tolist() == [[0, 1, 3, 4]] * 2
    assert blocks[0, 20].tolist() == [[0, 1, -1, -1]] * 2


def test_queries_in_blocks_are_those_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for query_block in (1000, 7):
        monkeypatch.setattr(reference, "QUERY_BLOCK", query_block)
        q, k, v = (x.requires_grad_() for x in draw(BOUNDS[-1]))
        layout = packed_layout()
        k_cmp, v_cmp = compress(k, layout, SIZE), compress(v, layout, SIZE)
        o, lse = compressed_attention(q, k_cmp, v_cmp, layout, block_size=SIZE, backend="reference")
        blocks = chosen_blocks(q.detach(), k.detach(), layout)
        y = selected_attention(q, k, v, blocks, layout, block_size=SIZE, backend="reference")
        grads = torch.autograd.grad((o.sin() + y.cos()).sum(), [q, k, v])
        results.append((o.detach(), lse, blocks, y.detach(), *grads))
    torch.testing.assert_close(*results)


def test_opcheck() -> None:
    q, k, v = (x[0].requires_grad_() for x in draw(BOUNDS[-1]))
    layout = packed_layout()
    k_cmp = torch.randn(layout.block_start.shape[0], 2, 10, dtype=torch.float64, requires_grad=True)
    _, lse = _compressed(q, k_cmp, k_cmp, *layout, SIZE, 0.3, "reference")
    blocks = _select(q, k_cmp, lse, *layout, SIZE, N_BLOCKS, 0.3, "reference")
    torch.library.opcheck(_compressed, (q, k_cmp, k_cmp.detach(), *layout, SIZE, 0.3, "reference"))
    torch.library.opcheck(
        _select, (q.detach(), k_cmp.detach(), lse.detach(), *layout, SIZE, N_BLOCKS, 0.3, "reference")
    )
    torch.library.opcheck(_selected, (q, k, v, blocks, *layout, SIZE, 0.3, "reference"))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = draw(32)
    layout = block_layout(1, 32, SIZE, None, CPU)
    k_cmp = compress(k, layout, SIZE)
    options = {"block_size": SIZE, "backend": "reference"}
    with pytest.raises(ValueError, match="n_blocks is 2, and 3 blocks are always among them"):
        select_blocks(q, k_cmp, q[..., 0], layout, n_blocks=2, **options)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        compressed_attention(q[:, :, :5], k_cmp, k_cmp, layout, **options)
    with pytest.raises(ValueError, match="must share one dtype"):
        selected_attention(q.float(), k, v, torch.zeros(1, 32, 2, 3), layout, **options)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        compressed_attention(q, k_cmp, k_cmp, layout, block_size=SIZE, backend="cuda")
    with pytest.raises(ValueError, match=r"bf16, fp16 or fp32"):
        compressed_attention(q, k_cmp, k_cmp, layout, block_size=SIZE, backend="fla")
    with pytest.raises(ValueError, match=r"block_size the GPU kernels take blocks of 16, 32, 64 or 128"):
        compressed_attention(q.float(), k_cmp.float(), k_cmp.float(), layout, block_size=8, backend="fla")
    assert gpu_misfit(16, 1, 128, 64) == gpu_misfit(6, 2, 40, 16) == ("", "")
    assert gpu_misfit(256, 1, 8, 64)[0] == "n_kv_heads" and gpu_misfit(2, 1, 512, 64)[0] == "head_dim"


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.n_elements = max([self.n_elements, *sizes])
        return out


def test_no_tensor_of_the_reference_grows_with_the_square_of_the_length() -> None:
    largest = []
    for length in (1024, 2048, 4096):
        q, k, v = (x[0].float() for x in draw(length, n_heads=2, n_kv_heads=1, width=4))
        layout = block_layout(1, length, SIZE, None, CPU)
        k_cmp, v_cmp = compress(k[None], layout, SIZE), compress(v[None], layout, SIZE)
        with _Largest() as seen:
            _, lse = reference.compressed_forward(q, k_cmp, v_cmp, layout, SIZE, 0.5)
            blocks = reference.select(q, k_cmp, lse, layout, SIZE, N_BLOCKS, 0.5)
            reference.selected_forward(q, k, v, blocks, layout, SIZE, 0.5)
            reference.compressed_backward(q, q, k_cmp, v_cmp, layout, SIZE, 0.5)
            reference.selected_backward(q, q, k, v, blocks, layout, SIZE, 0.5)
        largest.append(seen.n_elements)
    assert largest[2] / largest[1] < 2.1 and largest[1] / largest[0] < 2.1, largest
    assert largest[2] <= 2 * reference.QUERY_BLOCK * 4096
