"""Kimi delta attention on a GPU: flash-linear-attention's inner forward and backward functions (Triton).

The public functions of fla are not called: they are hidden from torch.compile and carry their own autograd. fla and
triton are imported inside the functions, so that this package works without them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lt2titan.kernels.packing import CHUNK_SIZE, contiguous, for_fla


class KDAKernels:
    """``bounded``: log-decays are known to lie in [-5, 0], so that chunks' diagonal blocks may run on tensor cores."""

    def __init__(self, bounded: bool) -> None:
        self.bounded = bounded

    def forward_chunked(
        self,
        inputs: Sequence[Tensor],
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_indices: Tensor | None,
        scale: float,
        return_final_state: bool,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Saves the chunks' decayed products q k^T, and the inverses of their I + A."""
        from fla.ops.kda.chunk_fwd import chunk_kda_fwd

        q, k, v, g, beta = map(contiguous, inputs)
        cu_seqlens, chunk_indices = for_fla(cu_seqlens, chunk_indices)
        o, final_state, _, scores, inverse, *_ = chunk_kda_fwd(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            scale=scale,
            initial_state=contiguous(initial_state),
            output_final_state=return_final_state,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
            chunk_size=CHUNK_SIZE,
            safe_gate=self.bounded,
        )
        return o.to(v.dtype), final_state, [scores, inverse]

    def empty_saved(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        _, k, v, _, _ = inputs
        return [k.new_empty(*v.shape[:3], CHUNK_SIZE), k.new_empty(*v.shape[:3], CHUNK_SIZE)]

    def forward_recurrent(
        self, inputs: Sequence[Tensor], initial_state: Tensor | None, scale: float, return_final_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

        q, k, v, g, beta = map(contiguous, inputs)
        return fused_recurrent_kda_fwd(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            scale=scale,
            initial_state=contiguous(initial_state),
            output_final_state=return_final_state,
            inplace_final_state=False,
        )

    def backward_chunked(
        self,
        do: Tensor,
        dfinal_state: Tensor | None,
        inputs: Sequence[Tensor],
        initial_state: Tensor | None,
        saved: Sequence[Tensor],
        cu_seqlens: Tensor | None,
        chunk_indices: Tensor | None,
        scale: float,
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        from fla.ops.kda.chunk_bwd import chunk_kda_bwd
        from fla.ops.utils import chunk_local_cumsum
        from fla.ops.utils.constant import RCP_LN2

        q, k, v, g, beta = map(contiguous, inputs)
        scores, inverse = saved
        cu_seqlens, chunk_indices = for_fla(cu_seqlens, chunk_indices)
        # The running sum of g in log2 is as large as q in fp32 and cheap: it is computed anew, not saved.
        g_cumsum = chunk_local_cumsum(
            g, chunk_size=CHUNK_SIZE, scale=RCP_LN2, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices
        )
        dq, dk, dv, dbeta, dg, dinitial_state, _, _ = chunk_kda_bwd(
            q=q,
            k=k,
            v=v,
            beta=beta,
            Aqk=scores,
            Akk=inverse,
            scale=scale,
            initial_state=contiguous(initial_state),
            do=contiguous(do),
            dht=contiguous(dfinal_state),
            g=g_cumsum,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
            chunk_size=CHUNK_SIZE,
            safe_gate=self.bounded,
        )
        return (dq, dk, dv, dg, dbeta), dinitial_state
