"""States at the start of every chunk, and their gradients: flash-linear-attention's kernels for S <- a S + k v^T.

fla's own host functions around these two kernels read the number of packed chunks from the device, which stalls the
host in every layer. Here it is the number of rows in ``chunk_indices``, an upper bound that the host knows; the kernels
leave the rows past the last chunk unwritten, and what reads them masks them out. Needs triton and fla, imported inside.

Shapes: B batch, L tokens, H heads of q, k and v, K and V head widths, N sequences (B, or the packed documents), M
chunks per row, all in the layout (K, V).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lt2titan.kernels.packing import CHUNK_SIZE


def forward_states(
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    return_final_state: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """States (B, M, H, K, V) in ``dtype`` before every chunk, and the final ones (N, H, K, V) in fp32.

    Args:
        k, v: (B, L, H, K) and (B, L, H, V), contiguous.
        g, gk: running sums within chunks of the logarithm to base 2 of the decay, per head (B, L, H) or per channel
            (B, L, H, K), in fp32.
        cu_seqlens, chunk_indices: from `packing.for_fla`.
    """
    import triton
    from fla.ops.common.chunk_h import chunk_fwd_kernel_h

    B, L, H, K, V = *k.shape, v.shape[-1]
    N, M, offsets = _chunks(B, L, cu_seqlens, chunk_indices)
    states = k.new_empty(B, M, H, K, V, dtype=dtype)
    final = k.new_empty(N, H, K, V, dtype=torch.float32) if return_final_state else None
    chunk_fwd_kernel_h[lambda meta: (triton.cdiv(K, meta["BK"]) * triton.cdiv(V, meta["BV"]) * N * H,)](
        k=k,
        v=v,
        h=states,
        g=g,
        g_gamma=None,
        gk=gk,
        gv=None,
        h0=initial_state,
        ht=final,
        cu_seqlens=cu_seqlens,
        split_offsets=offsets,
        T=L,
        H=H,
        K=K,
        V=V,
        BT=CHUNK_SIZE,
        BS=CHUNK_SIZE,
        USE_G=g is not None,
        USE_G_GAMMA=False,
        USE_GK=gk is not None,
        USE_GV=False,
        STATE_V_FIRST=False,
    )
    return states, final


def backward_states(
    q: Tensor,
    do: Tensor,
    *,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    scale: float,
    initial_state: Tensor | None,
    dfinal_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients (B, M, H, K, V) of the states after every chunk, in fp32, and of initial_state (N, H, K, V) or None.

    Args:
        q, do: (B, L, H, K) and (B, L, H, V), contiguous; ``scale`` multiplies q.
        dfinal_state: (N, H, K, V) or None. The rest as in `forward_states`.
    """
    import triton
    from fla.ops.common.chunk_h import chunk_bwd_kernel_dh

    B, L, H, K, V = *q.shape, do.shape[-1]
    N, M, offsets = _chunks(B, L, cu_seqlens, chunk_indices)
    dstates = q.new_empty(B, M, H, K, V, dtype=torch.float32)
    dinitial_state = None if initial_state is None else torch.empty_like(initial_state)
    chunk_bwd_kernel_dh[lambda meta: (triton.cdiv(K, meta["BK"]) * triton.cdiv(V, meta["BV"]) * N * H,)](
        q=q,
        g=g,
        g_gamma=None,
        gk=gk,
        gv=None,
        do=do,
        dh=dstates,
        dht=dfinal_state,
        dh0=dinitial_state,
        cu_seqlens=cu_seqlens,
        split_offsets=offsets,
        scale=scale,
        T=L,
        HQ=H,
        H=H,
        K=K,
        V=V,
        BT=CHUNK_SIZE,
        BS=CHUNK_SIZE,
        NG=1,
        USE_G=g is not None,
        USE_G_GAMMA=False,
        USE_GK=gk is not None,
        USE_GV=False,
        STATE_V_FIRST=False,
    )
    return dstates, dinitial_state


def _chunks(B: int, L: int, cu_seqlens: Tensor | None, chunk_indices: Tensor | None) -> tuple[int, int, Tensor | None]:
    """Number of sequences, chunks per row (at most), and the first chunk of every document."""
    if cu_seqlens is None or chunk_indices is None:
        return B, -(-L // CHUNK_SIZE), None
    n_chunks = (cu_seqlens.diff() + CHUNK_SIZE - 1) // CHUNK_SIZE
    offsets = torch.cat([n_chunks.new_zeros(1), n_chunks.cumsum(0)])
    return cu_seqlens.shape[0] - 1, chunk_indices.shape[0], offsets
