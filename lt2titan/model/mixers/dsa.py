"""DeepSeek Sparse Attention, whose indexer learns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2titan.kernels.attention import attention, masked_attention
from lt2titan.kernels.dsa import dsa_attention, dsa_indexer_kl, dsa_select
from lt2titan.kernels.dsa.reference import attend_reference, index_scores, query_blocks, top_slots
from lt2titan.model.context import Carry, Context, apply_rotary
from lt2titan.model.layers import Linear, WholeLinear
from lt2titan.model.mixers.base import Common, Mixer, State, StateSpec
from lt2titan.model.mixers.config import DSAConfig
from lt2titan.model.mixers.full import write
from lt2titan.model.mixers.key_heads import own_key_heads
from lt2titan.model.mixers.rows import DocumentRows
from lt2titan.model.shares import gather_last, local
from lt2titan.model.stretch import Stretch, rows_so_far

Index = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and weights of the indexer, as in `DSA.index`."""

INDEXER_KL = "indexer_kl"
"""Name in the carry of the indexers' loss so far (1,): KL summed over queries, layers and loops, in nats."""


class DSA(Mixer):
    """Attention to the top_k earlier tokens that a lightning indexer likes best (arXiv 2512.02556, section 2.1).

    The indexer scores token s for token t by sum_j w_tj ReLU(q^I_tj . k^I_s), where q^I (J heads) and k^I (one, layer
    norm before RoPE) and w come from x detached from the graph. It learns by the KL divergence of the softmax of its
    scores from the attention distribution, averaged over heads, over what attention sees: every earlier token while
    `Context.sees_all`, the chosen ones after that. The divergence is summed up in the carry; nothing else of the
    indexer is differentiable, so that its loss trains it alone, and no other loss does.

    Where no document is longer than top_k, everything is chosen: this is the attention of mixers/full.py then.
    """

    auxiliary_losses = (INDEXER_KL,)

    def __init__(self, config: DSAConfig, common: Common) -> None:
        super().__init__()
        dim = common.dim
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        self.head_dim = self.rotary_dim = dim // config.n_heads
        self.n_index_heads, self.index_head_dim = config.n_index_heads, config.index_head_dim
        self.top_k, self.forced_first, self.forced_local = config.top_k, config.forced_first, config.forced_local
        self.is_first, self.backend = common.is_first, common.backend
        self.norm_eps = common.norm_eps
        self.n_slots = common.n_alike if config.reuse_every > 1 else 0
        """Selections in the carry: of every layer of this kind the last one."""
        self.q_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.k_proj = Linear(dim, self.n_kv_heads * self.head_dim, init_std=dim**-0.5)
        self.v_proj = Linear(dim, self.n_kv_heads * self.head_dim, init_std=dim**-0.5)
        self.o_proj = Linear(dim, dim, init_std=dim**-0.5)
        self.gate_proj = Linear(dim, dim, init_std=0.0) if config.output_gate else None
        self.index_q_proj = WholeLinear(dim, self.n_index_heads * self.index_head_dim, init_std=dim**-0.5)
        self.index_k_proj = WholeLinear(dim, self.index_head_dim, init_std=dim**-0.5)
        self.index_w_proj = WholeLinear(dim, self.n_index_heads, init_std=dim**-0.5)
        self.index_norm = nn.Parameter(torch.empty(self.index_head_dim))
        self.index_norm_bias = nn.Parameter(torch.empty(self.index_head_dim))

    @property
    def rotary_dims(self) -> set[int]:
        return {self.head_dim, self.index_head_dim}

    def forward(self, x: Tensor, context: Context, carry: Carry, state: State | None = None) -> tuple[Tensor, Carry]:
        q, k, v = self.heads(x, context)
        if state is not None:
            y, carry = self._continue(x, q, k, v, context, carry, state)
        else:
            y, carry = self._attend(x, q, k, v, context, carry)
        y = y.flatten(-2)
        if self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(y), carry

    def heads(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, L, H, D), k and v (B, L, Hkv, D) of x (B, L, dim): of this rank's heads, or k and v of all
        heads (`_keys_are_whole`)."""
        tables = context.rotary[self.head_dim]
        q = apply_rotary(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), tables)
        k = apply_rotary(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), tables)
        return q, k, self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def index(self, x: Tensor, context: Context) -> Index:
        """The indexer's queries (B, L, J, E), keys (B, L, E) and weights (B, L, J) of x (B, L, dim), which gets no
        gradient from them."""
        x, tables = x.detach(), context.rotary[self.index_head_dim]
        q = apply_rotary(self.index_q_proj(x).unflatten(-1, (-1, self.index_head_dim)), tables)
        weight, bias = local(self.index_norm, is_summed=False), local(self.index_norm_bias, is_summed=False)
        k = self.index_k_proj(x)
        k = F.rms_norm(k - k.mean(dim=-1, keepdim=True), weight.shape, weight, self.norm_eps) + bias  # a layer norm
        k = apply_rotary(k.unsqueeze(2), tables).squeeze(2)
        return q, k, self.index_w_proj(x) * (self.n_index_heads * self.index_head_dim) ** -0.5

    def _attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context, carry: Carry
    ) -> tuple[Tensor, Carry]:
        sees_all = context.sees_all or self.top_k >= context.max_seqlen
        learns = torch.is_grad_enabled() and not context.reuses_selection
        index = None if context.reuses_selection or (sees_all and not learns) else self.index(x, context)
        shape, cu_seqlens = q.shape, context.cu_seqlens  # boundaries over keys
        if context.stretch is not None:
            q, k, v, index = _with_earlier_keys(q, k, v, index, context.stretch)
            cu_seqlens = context.stretch.cu_seqlens_k
        indices = lse = None
        own_k, own_v = self._own_keys(k), self._own_keys(v)
        if sees_all:
            y = self._attend_all(q, own_k, own_v, context, cu_seqlens)
        else:
            if index is None:
                indices = carry[_slot(0)]
            else:
                indices = dsa_select(
                    *index,
                    top_k=self.top_k,
                    forced_first=self.forced_first,
                    forced_local=self.forced_local,
                    cu_seqlens=cu_seqlens,
                    backend=self.backend,
                )
            y, lse = dsa_attention(q, own_k, own_v, indices, backend=self.backend)
        carry = self._rotated(carry, indices)
        if learns:
            assert index is not None
            kl = dsa_indexer_kl(
                *index,
                self.of_all_ranks(q, self.head_dim),
                self.all_keys(k),
                indices=indices,
                lse=None if lse is None else self.of_all_ranks(lse),
                cu_seqlens=cu_seqlens,
                backend=self.backend,
            )
            carry = {**carry, INDEXER_KL: carry[INDEXER_KL] + kl}
        return y.reshape(shape), carry

    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor, context: Context, cu_seqlens_k: Tensor | None) -> Tensor:
        if context.cu_seqlens is not None:  # of packed rows it takes one with boundaries
            q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
        return attention(
            q,
            k,
            v,
            cu_seqlens=context.cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen=context.max_seqlen,
            backend=self.backend,
        )

    def of_all_ranks(self, x: Tensor, width: int = 0) -> Tensor:
        """Of every rank, without gradient: (B, L, H / n, ...) -> (B, L, H, ...), the last dimension ``width`` wide."""
        x = x.detach()
        if self.share.n_ranks == 1:
            return x
        gathered = gather_last(x.flatten(2), self.share)
        return gathered.unflatten(-1, (-1, width)) if width else gathered

    def all_keys(self, k: Tensor) -> Tensor:
        """Keys (B, L, Hkv, D) of all heads, without gradient, of what `heads` gives."""
        return k.detach() if self._keys_are_whole(self.share.n_ranks) else self.of_all_ranks(k, self.head_dim)

    def _own_keys(self, keys: Tensor) -> Tensor:
        """Keys, or values, that this rank's query heads attend to, of what `heads` gives."""
        if not self._keys_are_whole(self.share.n_ranks):
            return keys  # they came split
        return own_key_heads(keys, self.n_heads, self.share)

    def _keys_are_whole(self, n_ranks: int) -> bool:
        """Whether every tensor-parallel rank has all key heads, since they cannot be split evenly."""
        return self.n_kv_heads % n_ranks != 0

    def _rotated(self, carry: Carry, indices: Tensor | None) -> Carry:
        """The carry after this layer. Its selections are a queue: a layer takes its own from the front and puts it, or
        the new one, at the end, so that in the next loop it finds it in front again. So layers need no numbers, which
        compiled blocks would each need a graph for."""
        if not self.n_slots:
            return carry
        queue = [carry[_slot(i)] for i in range(self.n_slots)]
        queue = [*queue[1:], queue[0] if indices is None else indices]
        return {**carry, **{_slot(i): selection for i, selection in enumerate(queue)}}

    def initial_carry(self, x: Tensor, context: Context) -> Carry:
        if not self.is_first:
            return {}
        dtype = torch.promote_types(x.dtype, torch.float32)
        carry = {INDEXER_KL: x.new_zeros(1, dtype=dtype, requires_grad=x.requires_grad)}
        (batch, length), n_before = context.positions.shape, 0
        if context.stretch is not None:
            batch, length = context.stretch.rows(context.positions).shape
            n_before = context.stretch.share.rank * length
        shape = (batch, length, min(self.top_k, n_before + length))
        return carry | {_slot(i): x.new_zeros(shape, dtype=torch.int32) for i in range(self.n_slots)}

    def _continue(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context, carry: Carry, state: State
    ) -> tuple[Tensor, Carry]:
        """Attention of new tokens over those in ``state`` and themselves; as `full.cached_attention`."""
        index_q, index_k, w = self.index(x, context)
        chosen = carry[_slot(0)] if context.reuses_selection else None
        tokens = {"q": q, "index_q": index_q, "w": w}
        new = {"k": k, "v": v, "index_k": index_k, "positions": context.positions}
        rows = None if context.cu_seqlens is None else DocumentRows(context)
        if rows is not None:
            tokens = {name: rows.unpack(tensor) for name, tensor in tokens.items()}
            new = {name: rows.unpack(tensor, -1 if name == "positions" else 0) for name, tensor in new.items()}
        write(state, new, has_gaps=rows is not None)
        y, chosen = self._attend_state(**tokens, positions=new["positions"], chosen=chosen, state=state)
        return y if rows is None else rows.pack(y), self._rotated(carry, chosen)

    def _attend_state(
        self, q: Tensor, index_q: Tensor, w: Tensor, positions: Tensor, chosen: Tensor | None, state: State
    ) -> tuple[Tensor, Tensor]:
        """Of tokens that ``state`` holds already, in dense rows; output and selections (B, L, K) of slots, which are
        positions. Tokens at position -1 are gaps."""
        batch, capacity = state["positions"].shape
        held = state["positions"][:, None]
        outputs, selections = [], []
        for block in query_blocks(q.shape[1], batch * capacity * (self.n_index_heads + 1)):
            p = positions[:, block, None]
            visible = (held >= 0) & (held <= p)
            if self.top_k >= capacity:
                selections.append(positions.new_empty(batch, p.shape[1], 0, dtype=torch.int32))
                outputs.append(masked_attention(q[:, block], state["k"], state["v"], visible))
                continue
            if chosen is None:
                forced = held > p - self.forced_local
                if self.forced_first:
                    forced |= held == 0
                scores = index_scores(index_q[:, block], state["index_k"], w[:, block])
                selections.append(top_slots(scores, visible, forced & visible, self.top_k))
            else:
                selections.append(chosen[:, block])
            scale = self.head_dim**-0.5
            outputs.append(attend_reference(q[:, block], state["k"], state["v"], selections[-1], scale)[0])
        return torch.cat(outputs, dim=1), torch.cat(selections, dim=1)

    def learns_apart(self, name: str) -> bool:
        return name.startswith("index_")

    def split_parameters(self, n_ranks: int) -> dict[str, int]:
        rows = ["q_proj.weight"]
        if not self._keys_are_whole(n_ranks):
            rows += ["k_proj.weight", "v_proj.weight"]
        if self.gate_proj is not None:
            rows.append("gate_proj.weight")
        return {**dict.fromkeys(rows, 0), "o_proj.weight": 1}

    def state_spec(self, batch_size: int, max_length: int, window: int | None) -> dict[str, StateSpec]:
        shape = (batch_size, max_length, self.n_kv_heads, self.head_dim)
        return {
            "k": StateSpec(shape),
            "v": StateSpec(shape),
            "index_k": StateSpec((batch_size, max_length, self.index_head_dim)),
            "positions": StateSpec((batch_size, max_length), torch.int64, fill=-1),
        }

    def attention_flops(self, seq_len: int, window: int | None) -> float:
        return 4 * self.n_heads * self.head_dim * _mean_chosen(self.top_k, seq_len)

    def selection_flops(self, seq_len: int, reuses: bool, is_trained: bool, sees_all: bool) -> float:
        """Scores of all earlier keys, forward; where the indexer learns, those of the keys it learns from, and their
        gradients for q^I and k^I. Its projections have no gradient for x, and none of it runs where a loop reuses.
        What is computed again for its loss (attention's scores) is not counted, as nothing is that is recomputed."""
        n_parameters = sum(p.numel() for name, p in self.named_parameters() if self.learns_apart(name))
        n_passes = 3 if is_trained else 1
        n_chosen = _mean_chosen(seq_len if sees_all else self.top_k, seq_len)
        flops = 4.0 * self.n_heads * self.head_dim * (n_chosen - _mean_chosen(self.top_k, seq_len)) * n_passes
        if reuses or (sees_all and not is_trained):
            return flops - 2.0 * n_parameters * n_passes
        of_key = 2.0 * self.n_index_heads * self.index_head_dim
        if self.top_k < seq_len and not sees_all:
            flops += of_key * seq_len / 2
        if is_trained:
            flops += 3 * of_key * n_chosen - 2.0 * n_parameters
        return flops

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(1.0 if name == "index_norm" else 0.0)


def _with_earlier_keys(
    q: Tensor, k: Tensor, v: Tensor, index: Index | None, stretch: Stretch
) -> tuple[Tensor, Tensor, Tensor, Index | None]:
    """All in rows (B, L, ...), and of k, v and the indexer's keys those of earlier stretches too."""
    if index is None:
        k, v = rows_so_far(k, v, stretch=stretch)
        return stretch.rows(q), k, v, None
    index_q, index_k, w = index
    k, v, index_k = rows_so_far(k, v, index_k, stretch=stretch)
    return stretch.rows(q), k, v, (stretch.rows(index_q), index_k, stretch.rows(w))


def _mean_chosen(top_k: int, seq_len: int) -> float:
    """Of a token of a sequence, on average: the causal triangle, cut off at top_k."""
    n = min(top_k, seq_len)
    return n - n * n / (2 * seq_len)


def _slot(i: int) -> str:
    """Name in the carry of the i-th selection of the queue, (B, L, K) int32."""
    return f"dsa_selection_{i}"
