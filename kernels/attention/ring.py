"""Causal softmax attention over ranks that have stretches of the same rows, keys and values going round in a ring.

torch's ring, which is private to it and knows full attention over dense rows on GPUs alone. Against all-gathering keys
and values (model/stretch.py) it never holds those of more than two ranks, and sends them while it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ring_attention(q: Tensor, k: Tensor, v: Tensor, group: str) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the tokens of this rank before a query, and all those of earlier ranks.

    Args:
        q: (B, L, H, D) in bf16 or fp16.
        k, v: (B, L, Hkv, D) with H a multiple of Hkv.
        group: name of the ranks' process group, in the order of their stretches.

    Returns:
        (B, L, H, D).

    Raises:
        ValueError: tensors that the GPU kernel does not take.
    """
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"ring attention runs on a GPU in bf16 or fp16, not on {q.device.type} in {q.dtype}: set "
            "parallelism.context_parallel_attention = 'gather', or training.mixed_precision_param = 'bfloat16'"
        )
    n_groups = q.shape[2] // k.shape[2]
    if n_groups > 1:
        k, v = k.repeat_interleave(n_groups, dim=2), v.repeat_interleave(n_groups, dim=2)
    out, _ = _ring_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), group)
    return out.transpose(1, 2)


def ring_problem() -> str:
    """Why this torch has no ring to offer, "" if it has: what is used here is private to it and may move."""
    try:
        with _in_order() as ring:
            missing = [name for name in _NEEDED if not hasattr(ring, name)]
    except (ImportError, AttributeError) as error:
        return str(error)
    return f"torch.distributed.tensor has no {', '.join(missing)}" if missing else ""


_NEEDED = ("_scaled_dot_product_ring_flash_attention", "_scaled_dot_product_ring_flash_attention_backward")


class _Ring:
    """What torch's functions want to know of a mesh."""

    def __init__(self, group: str) -> None:
        self._group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]

    def get_group(self) -> dist.ProcessGroup:
        return self._group


@contextmanager
def _in_order() -> Iterator[Any]:
    """torch's module, told that ranks have contiguous stretches, and to pass keys on rather than gather them."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    options = ring._cp_options
    before = options.enable_load_balance, options.rotate_method
    options.enable_load_balance, options.rotate_method = False, ring._RotateMethod.ALL_TO_ALL
    try:
        yield ring
    finally:
        options.enable_load_balance, options.rotate_method = before


@torch.library.custom_op("lt2titan::ring_attention", mutates_args=())
def _ring_attention(q: Tensor, k: Tensor, v: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """(B, H, L, D) each -> (output, log-sum-exp (B, H, L) in fp32)."""
    with _in_order() as ring:
        out, logsumexp, *_ = ring._scaled_dot_product_ring_flash_attention(_Ring(group), q, k, v, is_causal=True)
    return out.to(q.dtype).contiguous(), logsumexp.contiguous()


@_ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("lt2titan::ring_attention_backward", mutates_args=())
def _ring_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # random state of a dropout that there is not
    with _in_order() as ring:
        dq, dk, dv, *_ = ring._scaled_dot_product_ring_flash_attention_backward(
            _Ring(group), dout, q, k, v, out, logsumexp, None, None, q.shape[2], k.shape[2], 0.0, True, unused, unused
        )
    # dk and dv come as parts of one buffer, and an operator's outputs must not share memory.
    return tuple(x.to(q.dtype).clone(memory_format=torch.contiguous_format) for x in (dq, dk, dv))  # type: ignore[return-value]


@_ring_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.group = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, logsumexp = ctx.saved_tensors
    return *_ring_attention_backward(dout, q, k, v, out, logsumexp, ctx.group), None


_ring_attention.register_autograd(_backward, setup_context=_setup_context)
