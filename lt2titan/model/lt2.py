"""LT2: a looped language model (arXiv 2605.20670). Knows nothing of how it lies on devices."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from lt2titan.kernels.packing import check_cu_seqlens
from lt2titan.model.config import ModelConfig
from lt2titan.model.head import ChunkLoss, chunk_loss_sum, logits, loss_sum
from lt2titan.model.layers import Embedding, Linear, RMSNorm
from lt2titan.model.looped_core import LoopedCore
from lt2titan.model.shares import Share
from lt2titan.model.state import DecodeState


class LT2(nn.Module):
    """Embedding -> looped core -> norm -> head. Build it on ``meta``, lay it out, then `materialise` it.

    Parameter names are part of the checkpoint format: embedding.weight, core.rho, core.blocks.{i}.{mixer_norm, mixer,
    ffn_norm, ffn}.*, norm.weight, and head.weight unless the embedding is tied.
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.core = LoopedCore(config, backend)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        tied = config.tie_embeddings
        self.head = None if tied else Linear(config.dim, config.vocab_size, init_std=config.dim**-0.5)
        self.chunk_loss: ChunkLoss = chunk_loss_sum
        """Set by parallel/compile.py."""
        self.stretches = Share()
        """Of every row, which tokens this rank has; set by parallel/context_parallel.py."""
        self.is_ring = False
        """Whether attention passes keys round among these ranks; likewise."""

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        max_seqlen: int = 0,
        state: DecodeState | None = None,
        logits_at: Tensor | None = None,
        n_loops: int = 0,
        n_backward_loops: int = 0,
        sees_all: bool = False,
        with_auxiliary: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, L, vocab), or (M, vocab) of chosen tokens, or with ``targets`` the summed cross-entropy.

        The cross-entropy is a scalar, in nats. Under context parallelism everything is this rank's part of the rows.

        Args:
            tokens: (B, L) int64.
            targets: (B, L) int64, head.IGNORE_INDEX where nothing is predicted.
            positions: (B, L) int64, each token's place in its document; by default its place in the row. Not with
                state, which knows them.
            cu_seqlens: (N + 1,) int32, boundaries of packed documents over the flattened tokens (B x L); positions
                must then restart with them.
            cu_seqlens_k: (N + 1,) int32, under context parallelism with cu_seqlens: the documents' boundaries over the
                rows from their first token to this rank's last (see data.packing.Batch.stretch).
            chunk_indices: see kernels.packing.make_chunk_indices; saves a device sync with cu_seqlens.
            max_seqlen: upper bound on the documents' lengths on a rank, with cu_seqlens.
            state: continue the sequences in it, and update it in place. Without cu_seqlens, row b continues sequence
                b; with cu_seqlens, document n (which may be empty) continues sequence n: a prefill of prompts of
                unequal lengths. cu_seqlens may then stay on the CPU, which saves a device sync.
            logits_at: (M,) int64, places in the flattened tokens (B x L): of these alone logits are wanted.
            n_loops: passes over the blocks, at most config.n_loops; 0 means all of them. Not with state.
            n_backward_loops: gradients pass through this many of the last loops; 0 means through all.
            sees_all: attention that chooses what it sees does not yet, see Context.
            with_auxiliary: also return the losses that layers have of their own, summed over everything, by name (see
                `Mixer.auxiliary_losses`). They are no part of the cross-entropy; only where there are gradients.

        Raises:
            ValueError: state does not fit the call or has no room for its tokens; it is left as it was.
        """
        shape = tokens.shape
        self._check_loops(n_loops, n_backward_loops, state)
        if state is not None:
            self._check_state(state, tokens, positions, cu_seqlens)
            if cu_seqlens is None:
                positions = state.advance(shape[1])
            else:
                bounds = check_cu_seqlens(cu_seqlens, tokens.numel())
                cu_seqlens = cu_seqlens.to(tokens.device)
                positions = state.advance_packed(bounds, cu_seqlens)
                max_seqlen = max(end - start for start, end in pairwise(bounds))
        elif positions is None and self.stretches.n_ranks > 1 and cu_seqlens is not None:
            raise ValueError("packed documents under context parallelism need positions: they say which began earlier")
        elif positions is None:
            first = self.stretches.rank * shape[1]
            positions = torch.arange(first, first + shape[1], device=tokens.device).expand(shape)
        context = self.core.make_context(
            positions,
            stretches=self.stretches,
            is_ring=self.is_ring,
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            chunk_indices=chunk_indices,
            max_seqlen=max_seqlen,
            sees_all=sees_all,
            is_decoding=state is not None,
        )
        tokens = tokens.reshape(context.positions.shape)
        h, auxiliary = self.core(
            self.embedding(tokens), context, None if state is None else state.slots, n_loops, n_backward_loops
        )
        h = self.norm(h)
        if targets is not None:
            output = loss_sum(h, self.head_weight, targets.reshape(tokens.shape), self.chunk_loss)
        elif logits_at is not None:
            output = logits(h.flatten(0, 1)[logits_at], self.head_weight)
        else:
            output = logits(h, self.head_weight).view(*shape, -1)
        return (output, auxiliary) if with_auxiliary else output

    def _check_loops(self, n_loops: int, n_backward_loops: int, state: DecodeState | None) -> None:
        most = self.config.n_loops
        if not 0 <= n_loops <= most or not 0 <= n_backward_loops <= (n_loops or most):
            raise ValueError(
                f"n_loops = {n_loops} and n_backward_loops = {n_backward_loops}: a model of {most} loops runs 0 (all) "
                "to that many, and gradients pass through no more than run"
            )
        if state is not None and self.stretches.n_ranks > 1:
            raise ValueError("a model with context parallelism does not decode: load its checkpoint into one process")
        if n_loops and state is not None:
            raise ValueError(f"n_loops = {n_loops} cannot be given with a decode state, which has slots for all loops")

    def _check_state(
        self, state: DecodeState, tokens: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        if positions is not None:
            raise ValueError("positions cannot be given with a decode state: each sequence goes on where it ended")
        if tokens.numel() == 0:
            raise ValueError(f"there are no tokens to continue the decode state with: tokens are {tuple(tokens.shape)}")
        if cu_seqlens is None and tokens.shape[0] != state.batch_size:
            raise ValueError(
                f"{tokens.shape[0]} rows of tokens cannot continue the {state.batch_size} sequences of the decode "
                "state: give one row for each, or packed documents with cu_seqlens"
            )
        visits, expected = [len(slots) for slots in state.slots], [len(self.core.blocks)] * self.core.n_loops
        if visits != expected:
            raise ValueError(
                f"the decode state has slots for {len(visits)} loops of {visits[0]} layers and the model visits "
                f"{len(expected)} of {expected[0]}: allocate it for this model"
            )
        if torch.is_grad_enabled():
            raise ValueError("a decode state is updated in place, which gradients cannot follow: use torch.no_grad()")
