"""Native sparse attention."""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.config.section import ConfigError
from lt2titan.kernels.attention import attention
from lt2titan.kernels.nsa import (
    MAX_GROUP,
    BlockLayout,
    compress,
    compressed_attention,
    gpu_misfit,
    select_blocks,
    selected_attention,
)
from lt2titan.kernels.nsa.cached import Branches, cached_branches
from lt2titan.model.context import Carry, Context, apply_rotary
from lt2titan.model.layers import Linear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import NSAConfig
from lt2titan.model.mixers.config.sizes import divisors
from lt2titan.model.mixers.rows import DocumentRows
from lt2titan.model.shares import gather_last
from lt2titan.model.stretch import with_earlier_keys


class NSA(Mixer):
    """Attention to block means, to the best blocks and to a window (arXiv 2502.11089, as in flash-linear-attention).

    All three branches have the same rotated queries and keys and the same values; blocks are compressed by their mean.
    The branches' outputs are weighted per head by sigmoid(W_g x) and added. See kernels/nsa.
    """

    def __init__(self, config: NSAConfig, common: Common) -> None:
        super().__init__()
        dim = common.dim
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        self.head_dim = self.rotary_dim = dim // config.n_heads
        self.block_size = self.key_block_size = config.block_size
        self.n_blocks, self.window, self.backend = config.n_blocks, config.window, common.backend
        # Whether every tensor-parallel rank has all of the keys, not those of some heads.
        self.keys_are_whole = self.n_kv_heads == 1
        if common.backend == "fla":
            _check_gpu_sizes(config, dim)
        self.q_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.k_proj = Linear(dim, self.n_kv_heads * self.head_dim, init_std=dim**-0.5)
        self.v_proj = Linear(dim, self.n_kv_heads * self.head_dim, init_std=dim**-0.5)
        self.gate_proj = Linear(dim, 3 * self.n_heads, init_std=dim**-0.5)  # (head, branch)
        self.o_proj = Linear(dim, dim, init_std=dim**-0.5)

    def forward(self, x: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        q, k, v = self.heads(x, context)
        own, cached = self._branches, self._cached_branches
        branches = own(q, k, v, context) if state is None else cached(q, k, v, context, state)
        gates = torch.sigmoid(self.gate_proj(x)).unflatten(-1, (-1, 3, 1)).unbind(-2)
        y = sum(gate * branch for gate, branch in zip(gates, branches, strict=True))
        return self.o_proj(y.flatten(-2)), carry

    def heads(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, L, H, D), k and v (B, L, Hkv, D) of x (B, L, dim)."""
        tables = context.rotary[self.head_dim]
        q = apply_rotary(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), tables)
        k = apply_rotary(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), tables)
        return q, k, self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def _branches(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Branches:
        block_size, backend, layout = self.block_size, self.backend, context.key_blocks[self.block_size]
        cu_seqlens_k = context.cu_seqlens
        if context.stretch is not None:
            k, v = (x.contiguous() for x in with_earlier_keys(k, v, context.stretch))  # copied once for all branches
            cu_seqlens_k = context.stretch.cu_seqlens_k
        k_cmp, v_cmp = compress(k, layout, block_size), compress(v, layout, block_size)
        compressed, lse = compressed_attention(q, k_cmp, v_cmp, layout, block_size=block_size, backend=backend)
        blocks = self.choose(q, k_cmp, lse, layout)
        selected = selected_attention(q, k, v, blocks, layout, block_size=block_size, backend=backend)
        windowed = attention(
            q,
            k,
            v,
            window=self.window,
            cu_seqlens=context.cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen=context.max_seqlen,
            backend=backend,
        )
        return compressed, selected, windowed

    def choose(self, q: Tensor, k_cmp: Tensor, lse: Tensor, layout: BlockLayout) -> Tensor:
        """Blocks (B, L, Hkv, n_blocks) of queries q (B, L, H, D), see `select_blocks`. If one key head serves the query
        heads of all tensor-parallel ranks, every one ranks by all of them, and so all choose the same."""
        block_size, n_blocks = self.block_size, self.n_blocks
        with torch.no_grad():
            q, lse = self.of_group(q, self.head_dim), self.of_group(lse)
            return select_blocks(q, k_cmp, lse, layout, block_size=block_size, n_blocks=n_blocks, backend=self.backend)

    def of_group(self, x: Tensor, width: int = 0) -> Tensor:
        """(B, L, heads, ...) of this rank -> of all ranks that have heads of one group, without gradient; the last
        dimension is ``width`` wide."""
        x = x.detach()
        if self.share.n_ranks == 1 or not self.keys_are_whole:
            return x
        gathered = gather_last(x.flatten(2), self.share)
        return gathered.unflatten(-1, (-1, width)) if width else gathered

    def _cached_branches(self, q: Tensor, k: Tensor, v: Tensor, context: Context, state: State) -> Branches:
        """Of new tokens, which then are in ``state`` too. Row b, or packed document b, continues sequence b."""
        positions, rows = context.positions, None
        if context.cu_seqlens is not None:
            rows = DocumentRows(context)
            q, k, v, positions = rows.unpack(q), rows.unpack(k), rows.unpack(v), rows.unpack(positions, -1)
        remember(state, k, v, positions, self.block_size)
        branches = cached_branches(
            q,
            state["k"],
            state["v"],
            state["k_cmp"],
            state["v_cmp"],
            positions,
            block_size=self.block_size,
            n_blocks=self.n_blocks,
            window=self.window,
        )
        if rows is None:
            return branches
        compressed, selected, windowed = (rows.pack(branch) for branch in branches)
        return compressed, selected, windowed

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        rows = ["q_proj.weight", "gate_proj.weight"]
        if not self.keys_are_whole:
            rows += ["k_proj.weight", "v_proj.weight"]
        return {**dict.fromkeys(rows, 0), "o_proj.weight": 1}

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        all_keys = StateSpec((batch_size, max_length, self.n_kv_heads, self.head_dim))
        n_blocks = -(-max_length // self.block_size)
        compressed = StateSpec((batch_size, n_blocks, self.n_kv_heads, self.head_dim))
        return {"k": all_keys, "v": all_keys, "k_cmp": compressed, "v_cmp": compressed}

    def attention_flops(self, seq_len: int, window: int | None) -> float:
        def mean_keys(n_seen: float) -> float:
            n = min(n_seen, seq_len)
            return n - n * n / (2 * seq_len)  # the causal triangle, cut off at what is seen

        # Of its own block a token sees half on average.
        n_selected = mean_keys(self.block_size * (self.n_blocks - 0.5))
        n_compressed = seq_len / (2 * self.block_size)
        return 4 * self.n_heads * self.head_dim * (n_compressed + n_selected + mean_keys(self.window))


def remember(state: State, k: Tensor, v: Tensor, positions: Tensor, block_size: int) -> None:
    """Put new keys and values (B, n, Hkv, D) into their slots of ``state``, the token at position p into slot p, and
    the means of the blocks that they complete. ``positions`` (B, n) rise by one to the right; below 0 there is none."""
    last = positions[:, -1:]
    new = torch.arange(1 - k.shape[1], 1, device=k.device) + last  # below 0 in gaps too
    is_new = positions >= 0
    # Blocks that are whole now: at least those that the new tokens complete; the mean of an older one is the same.
    n_blocks = min(k.shape[1] // block_size + 1, state["k_cmp"].shape[1])
    block = (last + 1) // block_size - 1 - torch.arange(n_blocks, device=k.device)
    tokens = block.clamp(min=0)[..., None] * block_size + torch.arange(block_size, device=k.device)
    row = torch.arange(k.shape[0], device=k.device)[:, None, None]
    for name, tensor in (("k", k), ("v", v)):
        _put(state[name], new, tensor, is_new)
        means = state[name][row, tokens.clamp(max=state[name].shape[1] - 1)].mean(dim=2)
        _put(state[f"{name}_cmp"], block, means, block >= 0)


def _put(cache: Tensor, slots: Tensor, values: Tensor, is_value: Tensor) -> None:
    """cache (B, C, ...)[b, slots[b, i]] = values[b, i] (B, n, ...) where is_value (B, n). The slots of a row are n <= C
    consecutive ones, in either direction; those below 0 stand in for others, none twice, which keep what they hold."""
    trailing = (1,) * (cache.dim() - 2)
    index = (slots % cache.shape[1]).view(*slots.shape, *trailing).expand_as(values)
    keep = cache.gather(1, index)
    cache.scatter_(1, index, torch.where(is_value.view(*slots.shape, *trailing), values, keep))


def _check_gpu_sizes(config: NSAConfig, dim: int) -> None:
    """Refuse what the GPU kernels do not take, and say what would fit."""
    n_kv_heads = config.n_kv_heads or config.n_heads
    size, reason = gpu_misfit(config.n_heads, n_kv_heads, dim // config.n_heads, config.block_size)
    or_reference = "or set kernels.backend=reference (plain PyTorch, slow on a GPU)"
    if size == "n_kv_heads":
        fewest = next(n for n in divisors(config.n_heads) if config.n_heads // n <= MAX_GROUP)
        reason += f"; use at least {fewest}, {or_reference}"
        raise ConfigError("model.mixers.nsa.n_kv_heads", config.n_kv_heads, reason)
    if size == "head_dim":
        reason += f"; use at least {-(-dim // 256)} heads, {or_reference}"
        raise ConfigError("model.mixers.nsa.n_heads", config.n_heads, reason)
    if size:
        raise ConfigError("model.mixers.nsa.block_size", config.block_size, f"{reason}; take one, {or_reference}")
