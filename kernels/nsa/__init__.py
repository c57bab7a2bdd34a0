"""Native sparse attention (arXiv 2502.11089) in three branches with one key and value for all of them.

Keys are divided into blocks that start anew with every document. A query attends to the means of the blocks that are
wholly past (`compressed_attention`), and to all tokens of the few blocks that matter most to it (`selected_attention`);
`select_blocks` ranks them by the probabilities of the former, summed over the heads that share a key head. The third
branch, a window, is `kernels.attention`. How the branches are weighted is the mixer's business. There may be keys of
earlier tokens that have no query here: `BlockLayout` says which query is the token of which key.

Selection has no gradient. Which blocks: the first, the query's own and the one before it always, then by rank; of
blocks with equal probability the older is taken. The reference and the GPU kernels keep the same rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lt2titan.kernels.nsa import reference
from lt2titan.kernels.nsa.layout import BlockLayout, block_layout

__all__ = [
    "BlockLayout",
    "block_layout",
    "compress",
    "compressed_attention",
    "gpu_misfit",
    "select_blocks",
    "selected_attention",
]

N_FORCED = 3
"""Blocks that every query looks at: the first, its own and the one before it."""

MAX_GROUP = 64
"""Query heads that can share a key head on a GPU: one token's heads of 256 channels in fp32 fill the shared memory."""


def compress(x: Tensor, layout: BlockLayout, block_size: int) -> Tensor:
    """Means over the blocks: x (B, Lk, Hkv, D) -> (C, Hkv, D). Of blocks that are not whole, which no query sees in
    compressed form, it is something finite."""
    return _Compress.apply(x.flatten(0, 1), layout.key_block, layout.block_start, block_size)  # type: ignore[no-any-return]


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, layout: BlockLayout, *, block_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    """softmax(q k_cmp^T / sqrt(D)) v_cmp over the blocks of the query's document that are wholly past.

    Args:
        q: (B, L, H, D).
        k_cmp: (C, Hkv, D) with H a multiple of Hkv, from `compress`; so is v_cmp.
        layout: of the queries and keys.
        block_size: keys in a block.
        backend: "reference" (any device, any sizes) or "fla" (Triton kernels).

    Returns:
        Output (B, L, H, D), 0 for queries without a past block, and the scores' log-sum-exp (B, L, H) in fp32 or fp64,
        -inf for those; the latter has no gradient.
    """
    _check("compressed_attention", q, k_cmp, v_cmp, block_size, backend)
    scale = q.shape[-1] ** -0.5
    o, lse = _compressed(q.flatten(0, 1), k_cmp, v_cmp, *layout, block_size, scale, backend)
    return o.view(q.shape), lse.view(q.shape[:-1])


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, layout: BlockLayout, *, block_size: int, n_blocks: int, backend: str
) -> Tensor:
    """The blocks of its document that each query looks at whole.

    Args:
        q: (B, L, H, D), of all heads that share the key heads.
        k_cmp: (C, Hkv, D).
        lse: (B, L, H), from `compressed_attention`.
        layout: of the queries and keys.
        block_size: keys in a block.
        n_blocks: blocks to choose, at least 3.
        backend: as there.

    Returns:
        (B, L, Hkv, n_blocks) int32, counted from the document's start, rising; -1 at the end while there are fewer.
    """
    _check("select_blocks", q, k_cmp, k_cmp, block_size, backend)
    if n_blocks < N_FORCED:
        raise ValueError(f"select_blocks: n_blocks is {n_blocks}, and {N_FORCED} blocks are always among them")
    scale = q.shape[-1] ** -0.5
    blocks = _select(q.flatten(0, 1), k_cmp, lse.flatten(0, 1), *layout, block_size, n_blocks, scale, backend)
    return blocks.view(*q.shape[:2], *blocks.shape[1:])


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, layout: BlockLayout, *, block_size: int, backend: str
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the tokens of chosen blocks, up to the query itself.

    Args:
        q: (B, L, H, D).
        k: (B, Lk, Hkv, D) with H a multiple of Hkv; so is v. The last keys of each row are those of its queries.
        blocks: (B, L, Hkv, n_blocks) int32, from `select_blocks`; the query's own block must be among them.
        layout: of the queries and keys.
        block_size: keys in a block.
        backend: as in `compressed_attention`.

    Returns:
        (B, L, H, D).
    """
    _check("selected_attention", q, k, v, block_size, backend)
    scale = q.shape[-1] ** -0.5
    tensors = (x.flatten(0, 1) for x in (q, k, v, blocks))
    o, _ = _selected(*tensors, *layout, block_size, scale, backend)
    return o.view(q.shape)


def gpu_misfit(n_heads: int, n_kv_heads: int, head_dim: int, block_size: int) -> tuple[str, str]:
    """Which size the GPU kernels do not take ("head_dim", "n_kv_heads" or "block_size"), and why; two times "" if they
    take all of them. They pad every other size to what tensor cores want."""
    group = n_heads // n_kv_heads
    if group > MAX_GROUP:
        return "n_kv_heads", f"makes {group} query heads share a key head, and the GPU kernels take up to {MAX_GROUP}"
    if head_dim > 256:
        return "head_dim", f"the GPU kernels take heads up to 256 wide, not {head_dim}"
    if block_size not in (16, 32, 64, 128):
        return "block_size", "the GPU kernels take blocks of 16, 32, 64 or 128 tokens"
    return "", ""


class _Compress(torch.autograd.Function):
    """Gathers in both directions: nothing is added up in an order that a GPU chooses."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, key_block: Tensor, block_start: Tensor, block_size: int
    ) -> Tensor:
        ctx.save_for_backward(key_block)
        ctx.block_size = block_size
        tokens = block_start[:, None] + torch.arange(block_size, device=x.device)
        return x[tokens.clamp(max=x.shape[0] - 1)].mean(dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (key_block,) = ctx.saved_tensors
        return gradient[key_block] / ctx.block_size, None, None, None


_LAYOUT = ", ".join(f"Tensor {name}" for name in BlockLayout._fields)


@torch.library.custom_op(
    "lt2titan::nsa_compressed",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k_cmp, Tensor v_cmp, {_LAYOUT}, int block_size, float scale, str backend)"
    " -> (Tensor, Tensor)",
)
def _compressed(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *layout, block_size, scale, backend = rest
    if backend == "reference":
        return reference.compressed_forward(q, k_cmp, v_cmp, BlockLayout(*layout), block_size, scale)
    from lt2titan.kernels.nsa import compressed_triton

    return compressed_triton.forward(q, k_cmp, v_cmp, BlockLayout(*layout), block_size, scale)


@_compressed.register_fake
def _(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=_precise(q))


@torch.library.custom_op(
    "lt2titan::nsa_compressed_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor o, Tensor lse, {_LAYOUT}, int block_size,"
    " float scale, str backend) -> (Tensor, Tensor, Tensor)",
)
def _compressed_backward(
    do: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, o: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *layout, block_size, scale, backend = rest
    if backend == "reference":
        return reference.compressed_backward(do, q, k_cmp, v_cmp, BlockLayout(*layout), block_size, scale)
    from lt2titan.kernels.nsa import compressed_triton

    return compressed_triton.backward(do, q, k_cmp, v_cmp, o, lse, BlockLayout(*layout), block_size, scale)


@torch.library.custom_op(
    "lt2titan::nsa_select",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k_cmp, Tensor lse, {_LAYOUT}, int block_size, int n_blocks, float scale, str backend)"
    " -> Tensor",
)
def _select(q: Tensor, k_cmp: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    *layout, block_size, n_blocks, scale, backend = rest
    if backend == "reference":
        return reference.select(q, k_cmp, lse, BlockLayout(*layout), block_size, n_blocks, scale)
    from lt2titan.kernels.nsa import compressed_triton

    return compressed_triton.select(q, k_cmp, lse, BlockLayout(*layout), block_size, n_blocks, scale)


@_select.register_fake
def _(q: Tensor, k_cmp: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    n_blocks = rest[-3]
    return q.new_empty((q.shape[0], k_cmp.shape[1], n_blocks), dtype=torch.int32)


@torch.library.custom_op(
    "lt2titan::nsa_selected",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor blocks, {_LAYOUT}, int block_size, float scale, str backend)"
    " -> (Tensor, Tensor)",
)
def _selected(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Output and the scores' log-sum-exp, which the kernels' backward pass needs and the reference's does not."""
    *layout, block_size, scale, backend = rest
    if backend == "reference":
        o = reference.selected_forward(q, k, v, blocks, BlockLayout(*layout), block_size, scale)
        return o, q.new_empty(0, dtype=_precise(q))
    from lt2titan.kernels.nsa import selected_triton

    return selected_triton.forward(q, k, v, blocks, BlockLayout(*layout), block_size, scale)


@_selected.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    backend = rest[-1]
    return q.new_empty(q.shape), q.new_empty(0 if backend == "reference" else q.shape[:-1], dtype=_precise(q))


@torch.library.custom_op(
    "lt2titan::nsa_selected_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor blocks, {_LAYOUT}, int block_size,"
    " float scale, str backend) -> (Tensor, Tensor, Tensor)",
)
def _selected_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, blocks: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *layout, block_size, scale, backend = rest
    if backend == "reference":
        return reference.selected_backward(do, q, k, v, blocks, BlockLayout(*layout), block_size, scale)
    from lt2titan.kernels.nsa import selected_triton

    return selected_triton.backward(do, q, k, v, o, lse, blocks, BlockLayout(*layout), block_size, scale)


@_compressed_backward.register_fake
@_selected_backward.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_compressed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k_cmp, v_cmp, *layout, ctx.block_size, ctx.scale, ctx.backend = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k_cmp, v_cmp, o, lse, *layout)


def _setup_selected(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, blocks, *layout, ctx.block_size, ctx.scale, ctx.backend = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse, blocks, *layout)


def _compressed_autograd(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _compressed_backward(do.contiguous(), *ctx.saved_tensors, ctx.block_size, ctx.scale, ctx.backend)
    return (*grads, *[None] * (len(BlockLayout._fields) + 3))


def _selected_autograd(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _selected_backward(do.contiguous(), *ctx.saved_tensors, ctx.block_size, ctx.scale, ctx.backend)
    return (*grads, *[None] * (len(BlockLayout._fields) + 4))


_compressed.register_autograd(_compressed_autograd, setup_context=_setup_compressed)
_selected.register_autograd(_selected_autograd, setup_context=_setup_selected)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(name: str, q: Tensor, k: Tensor, v: Tensor, block_size: int, backend: str) -> None:
    if backend not in ("reference", "fla"):
        raise ValueError(f"{name}: backend is {backend!r}, must be 'reference' or 'fla' (see resolve_backend)")
    n_heads, head_dim = q.shape[-2:]
    if q.dim() != 4 or k.shape != v.shape or k.shape[-1] != head_dim or n_heads % k.shape[-2]:
        raise ValueError(
            f"{name}: q is (B, L, H, D), k and v are (..., Hkv, D) with H a multiple of Hkv, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{name}: q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if backend == "fla":
        if q.dtype == torch.float64:
            raise ValueError(f"{name}: the GPU kernels take bf16, fp16 or fp32; use kernels.backend=reference")
        size, reason = gpu_misfit(n_heads, k.shape[-2], head_dim, block_size)
        if size:
            raise ValueError(f"{name}: {size} {reason}; change it, or use kernels.backend=reference")
